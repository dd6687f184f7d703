"""What a micro-batch holds: of pre-training, of questions, of statements, of pictures alone.

Knows the shapes and types that the loader fills and the objectives read. Knows nothing of files, models or devices
beyond moving itself to one. Shape letters: B pairs, L text tokens, M masked rows, F false pictures, H and W pixels,
N distinct pictures, A answers, G cells of a picture along one side, T tokens to write.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextToText:
    """Texts to read and texts to write, one of each for every pair.

    ids       [B,L'] int64, what the encoder reads, padded
    mask      [B,L'] bool, True on its real tokens
    text_rows [N] int64, its real tokens as rows of a [B*L'] view, ascending
    targets   [B,T] int64, what the decoder writes, padded
    lengths   [B] int64, tokens of each target
    rows      [M] int64, the targets' real tokens as rows of a [B*T] view, ascending
    """

    ids: Tensor
    mask: Tensor
    text_rows: Tensor
    targets: Tensor
    lengths: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> "TextToText":
        """The same texts on `device`."""
        return TextToText(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class RankedTexts:
    """The texts that are ranked for each of B pictures: all true ones, then the F false ones of each picture.

    ids       [B*(1+F),L'] int64, padded
    mask      [B*(1+F),L'] bool, True on real tokens
    text_rows [N] int64, the real tokens as rows of a [B*(1+F)*L'] view, ascending; None: found in `mask`
    """

    ids: Tensor
    mask: Tensor
    text_rows: Tensor | None = None

    def to(self, device: torch.device | str) -> "RankedTexts":
        """The same texts on `device`."""
        moved = (getattr(self, field.name) for field in fields(self))
        return RankedTexts(*(value if value is None else value.to(device, non_blocking=True) for value in moved))


@dataclass(frozen=True)
class PretrainBatch:
    """One micro-batch of (picture, caption) pairs, for the objectives of pre-training and for retrieval.

    images         [B,3,H,W] float, normalised pixels of the captions' own pictures
    text_ids       [B,L] int64, padded with the tokenizer's padding id; L is the batch's longest caption
    text_mask      [B,L] bool, True on real tokens
    masked_ids     [B,L] int64, `text_ids` with the MLM replacements made
    masked_rows    [M] int64, the places to predict as rows of a [B*L] view, ascending; may be empty
    masked_labels  [M] int64, the original ids at `masked_rows`
    itm_labels     [B] int64, 1 where the pair of ITM matches, 0 where it does not
    itm_images     [B] int64, the picture of each ITM pair: a row of `cat(images, false_images)`
    false_images   [F,3,H,W] float, pictures that only ITM reads, or None when all negatives come from the batch
    sample_ids     [B] int64, which samples these are, after the replacement of bad ones
    text_rows      [N] int64, the real tokens as rows of a [B*L] view, ascending; None: whoever needs them finds them
                   in `text_mask`, which on a GPU means waiting for it
    span_denoising captions with spans hidden, and what was there; None where no objective asks for it
    caption        captions hidden as a whole; None where no objective asks for it
    ranked         the captions, and false ones for each picture; None where no objective asks for them

    For masked image modelling, of a picture cut into cells as the vision encoder's tokens are; else None:

    cell_mask      [B,G,G] bool, True on the cells that are hidden
    cell_rows      [M] int64, the hidden cells as rows of a [B*G*G] view, ascending; equally many in each picture
    cell_codes     [M] int64, what an image tokenizer says of the cells at `cell_rows`
    """

    images: Tensor
    text_ids: Tensor
    text_mask: Tensor
    masked_ids: Tensor
    masked_rows: Tensor
    masked_labels: Tensor
    itm_labels: Tensor
    itm_images: Tensor
    false_images: Tensor | None
    sample_ids: Tensor
    text_rows: Tensor | None = None
    cell_mask: Tensor | None = None
    cell_rows: Tensor | None = None
    cell_codes: Tensor | None = None
    span_denoising: TextToText | None = None
    caption: TextToText | None = None
    ranked: RankedTexts | None = None

    def __len__(self) -> int:
        """B, the number of pairs."""
        return self.images.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PretrainBatch":
        """The same batch on `device`; only pictures take `dtype`, ids and masks keep theirs."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TextToText | RankedTexts):
                value = value.to(device)
            elif value is not None:
                value = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            moved[field.name] = value
        return PretrainBatch(**moved)


@dataclass(frozen=True)
class VqaBatch:
    """One micro-batch of questions about pictures. Each picture is there once, however many ask about it.

    images         [N,3,H,W] float, normalised pixels
    image_rows     [B] int64, the picture that each question asks about, a row of `images`
    text_ids       [B,L] int64, the questions, padded with the tokenizer's padding id
    text_mask      [B,L] bool, True on real tokens
    targets        [B,A] float32, the score of each answer, 0 to 1; all 0 where a question has none
    question_ids   [B] int64, as in the tables
    sample_ids     [B] int64, which samples these are, after the replacement of bad ones
    text_rows      [T] int64, the real tokens as rows of a [B*L] view, ascending, or None
    """

    images: Tensor
    image_rows: Tensor
    text_ids: Tensor
    text_mask: Tensor
    targets: Tensor
    question_ids: Tensor
    sample_ids: Tensor
    text_rows: Tensor | None = None

    def __len__(self) -> int:
        """B, the number of questions."""
        return self.text_ids.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "VqaBatch":
        """The same batch on `device`; only pictures take `dtype`."""
        return VqaBatch(**_moved(self, device, dtype))


@dataclass(frozen=True)
class StatementBatch:
    """One micro-batch of statements about one or two pictures, each in one class. Each picture is there once.

    images         [N,3,H,W] float, normalised pixels
    image_rows     [B,K] int64, the K pictures that each statement is about, rows of `images`: 1 in SNLI-VE, 2 in NLVR2
    text_ids       [B,L] int64, the statements, padded with the tokenizer's padding id
    text_mask      [B,L] bool, True on real tokens
    labels         [B] int64: NLVR2 0 false, 1 true; SNLI-VE 0 contradiction, 1 neutral, 2 entailment
    sample_ids     [B] int64, which samples these are, after the replacement of bad ones
    text_rows      [T] int64, the real tokens as rows of a [B*L] view, ascending, or None
    """

    images: Tensor
    image_rows: Tensor
    text_ids: Tensor
    text_mask: Tensor
    labels: Tensor
    sample_ids: Tensor
    text_rows: Tensor | None = None

    def __len__(self) -> int:
        """B, the number of statements."""
        return self.text_ids.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "StatementBatch":
        """The same batch on `device`; only pictures take `dtype`."""
        return StatementBatch(**_moved(self, device, dtype))


@dataclass(frozen=True)
class PictureBatch:
    """One micro-batch of pictures alone.

    images         [B,3,H,W] float, normalised pixels
    sample_ids     [B] int64, which samples these are, after the replacement of bad ones
    """

    images: Tensor
    sample_ids: Tensor

    def __len__(self) -> int:
        """B, the number of pictures."""
        return self.images.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PictureBatch":
        """The same batch on `device`; only pictures take `dtype`."""
        images = self.images.to(device, dtype, non_blocking=True)
        return PictureBatch(images, self.sample_ids.to(device, non_blocking=True))


Batch = PretrainBatch | VqaBatch | StatementBatch | PictureBatch


def _moved(batch: VqaBatch | StatementBatch, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The fields of a batch on `device`; only pictures take `dtype`."""
    moved = {
        name: value if value is None else value.to(device, non_blocking=True) for name, value in vars(batch).items()
    }
    return moved | {"images": moved["images"].to(dtype)}
