"""What a model says of pictures: fills of hidden words, match probabilities, captions, and where a word looks.

Knows a Meter, a tokenizer and encoded pictures. Knows no files, no splits and no scores.
Shape letters: B pairs, N pictures, L text tokens, V image tokens, D width, S vocabulary, M hidden tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meter_fast.data.spans import read_sentinels
from meter_fast.models.generation import write
from meter_fast.models.meter import Meter, Need, Part

MAX_TEXT_LENGTH = 50  # tokens; METER, section 4.1
MATCH = 1  # class of the ITM head that says "this caption belongs to this picture"


@dataclass(frozen=True)
class MaskedCaption:
    """A caption with one word hidden: all its tokens are the mask token.

    caption: the full text; start, end: the hidden word in it; ids: token ids with the mask; places: which of them are
    masked; labels: what stood there.
    """

    caption: str
    start: int
    end: int
    ids: list[int]
    places: list[int]
    labels: list[int]

    @property
    def word(self) -> str:
        return self.caption[self.start : self.end]

    def shown(self, mask: str = "[MASK]") -> str:
        """The caption as the model gets it."""
        return self.caption[: self.start] + mask + self.caption[self.end :]


def hide_word(tokenizer, caption: str, start: int, end: int, max_length: int = MAX_TEXT_LENGTH) -> MaskedCaption | None:
    """Hide caption[start:end]. None when truncation to `max_length` tokens cuts the word off or through."""
    encoded = tokenizer(caption, truncation=True, max_length=max_length, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    offsets = encoded["offset_mapping"]
    places = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
    if not places or offsets[places[-1]][1] < end:
        return None
    labels = [ids[i] for i in places]
    for i in places:
        ids[i] = tokenizer.mask_token_id
    return MaskedCaption(caption, start, end, ids, places, labels)


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids [B,L] int64 and mask [B,L] bool, L the longest."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def place_of(model: Meter) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the model's pictures must have."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def cls_of(model: Meter, text: Tensor, image: Tensor, mask: Tensor, images: Tensor, image_type: int = 1) -> Tensor:
    """Encoded text [B,L,E] and pictures [N,V,D] -> cls [B,2D] ([B,D] of a decoder), which classifying heads read.

    images [B] int64: the picture of each text. image_type: as for `Meter.fuse`.
    """
    (fused,) = model.fuse_parts(text, image, mask, (Part(Need.CLS, len(text), images, image_type=image_type),))
    return fused.cls


def hidden_logits(
    model: Meter,
    text: Tensor,
    image: Tensor,
    mask: Tensor,
    rows: Tensor,
    columns: Tensor,
    images: Tensor | None = None,
) -> Tensor:
    """Encoded text [B,L,E] and pictures [N,V,D] -> logits [M,S] of the tokens at (rows, columns) [M] int64 each.

    images: as for `cls_of`; None: text i goes with picture i.
    """
    if images is None:
        fused = model.fuse(text, image, mask, need=Need.TEXT)
    else:
        (fused,) = model.fuse_parts(text, image, mask, (Part(Need.TEXT, len(text), images),))
    return model.mlm_head(fused.text[rows, columns])


def flat_places(captions: Sequence[MaskedCaption], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and labels [M] int64 of all hidden tokens of a batch."""
    flat = [(row, place, label) for row, c in enumerate(captions) for place, label in zip(c.places, c.labels)]
    return tuple(torch.tensor(column, device=device) for column in zip(*flat))


@torch.inference_mode()
def fill(
    model: Meter, tokenizer, image: Tensor, captions: Sequence[MaskedCaption], k: int = 5
) -> list[list[tuple[str, float]]]:
    """The k most probable fills of each caption's hidden word: image [B,V,D] encoded -> B lists of (token,
    probability), best first. Of a word of several tokens the first is filled."""
    device, _ = place_of(model)
    ids, mask = pad([c.ids for c in captions], tokenizer.pad_token_id, device)
    first = torch.tensor([c.places[0] for c in captions], device=device)
    rows = torch.arange(len(captions), device=device)
    logits = hidden_logits(model, model.encode_text(ids, mask), image, mask, rows, first)
    probabilities, tokens = logits.float().softmax(-1).topk(k)
    return [
        [(tokenizer.decode([token]).strip(), probability) for token, probability in zip(*row)]
        for row in zip(tokens.tolist(), probabilities.tolist())
    ]


@torch.inference_mode()
def match(model: Meter, tokenizer, image: Tensor, captions: Sequence[str], max_length: int = MAX_TEXT_LENGTH) -> Tensor:
    """Probability that caption i belongs to picture i: image [B,V,D] encoded, B captions -> [B] float32."""
    device, _ = place_of(model)
    rows = tokenizer(list(captions), truncation=True, max_length=max_length)["input_ids"]
    ids, mask = pad(rows, tokenizer.pad_token_id, device)
    fused = model.fuse(model.encode_text(ids, mask), image, mask, need=Need.CLS)
    return model.itm_head(fused.cls).float().softmax(-1)[:, MATCH]


@torch.inference_mode()
def caption(
    model: Meter,
    tokenizer,
    image: Tensor,
    beams: int = 1,
    max_length: int = MAX_TEXT_LENGTH,
    length_penalty: float = 1.0,
) -> list[str]:
    """A caption of each picture: image [B,V,D] encoded -> B texts, of at most max_length tokens.

    For a model with a decoder, trained with objectives.names=caption; in evaluation mode. Arguments of the search:
    `generation.write`. Raises ValueError for a model without decoder or a tokenizer without sentinels.
    """
    if model.decoder is None:
        raise ValueError(
            "this model has no decoder to write captions with: train one with fusion=encoder_decoder and "
            "objectives.names=span_denoising,itm,caption"
        )
    device, _ = place_of(model)
    asked = [tokenizer.cls_token_id, read_sentinels(tokenizer)[0], tokenizer.sep_token_id]
    ids, mask = pad([asked] * len(image), tokenizer.pad_token_id, device)
    fused = model.fuse(model.encode_text(ids, mask), image, mask, need=Need.BOTH)
    length = min(max_length, model.config.decoder.max_positions)
    written = write(model, fused.text, fused.image, mask, tokenizer.sep_token_id, length, beams, length_penalty)
    return [tokenizer.decode(text, skip_special_tokens=True).strip() for text in written.ids]


@torch.inference_mode()
def word_attention(model: Meter, tokenizer, image: Tensor, captions: Sequence[MaskedCaption]) -> Tensor:
    """How much the hidden word reads of each patch: image [B,V,D] encoded -> [B,grid,grid] float32, sums to 1.

    Mean over heads, over the upper half of the fusion layers and over the word's tokens; the class token is left out.
    """
    device, _ = place_of(model)
    ids, mask = pad([c.ids for c in captions], tokenizer.pad_token_id, device)
    fused = model.fuse(model.encode_text(ids, mask), image, mask, need=Need.TEXT, attention=True)
    upper = fused.attention[len(fused.attention) // 2 :]
    read = torch.stack([layer.float().mean(1) for layer in upper]).mean(0)
    words = torch.stack([read[row, c.places].mean(0) for row, c in enumerate(captions)])
    grid = model.config.vision.grid
    patches = words[:, -(grid**2) :]
    return (patches / patches.sum(-1, keepdim=True)).view(-1, grid, grid)
