"""Scores of pictures against captions: each encoded once, all that pairs share computed once.

Knows models, sources and image back ends; knows no runs, no files of scores and no commands. A model that was
fine-tuned for retrieval ranks by its rank head, another by the ITM head (zero-shot, METER, section 4.2).

Texts come in groups of one length, so that nothing is padded; a group meets a few pictures at a time. What depends on
the picture or the text alone in the fusion is computed once for each of them in such a group, and only the two [CLS]
rows of the last layer. The scores are those of one pass for each pair. Shape letters: N and P pictures, T texts, C
texts of a group, L text tokens, V image tokens, D width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage
from meter_fast.data.images import ImageBackend
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.predict import MATCH, pad, place_of
from meter_fast.recall import Retrieval
from meter_fast.score import read_captions, read_picture, samples_by_picture

PAIRS_AT_ONCE = 256  # at most
TOKENS_AT_ONCE = 1 << 17  # of pictures, over the pairs: bounds the memory of large pictures
PICTURES_PER_BLOCK = 8


@dataclass(frozen=True)
class EncodedTexts:
    """Some texts of one length: features [C,L,D], mask [C,L] bool, columns [C] int64: which texts they are."""

    features: Tensor
    mask: Tensor
    columns: Tensor


def pairs_at_once(model: Meter) -> int:
    """How many pairs go through the fusion together."""
    return max(1, min(PAIRS_AT_ONCE, TOKENS_AT_ONCE // model.config.vision.tokens))


@torch.inference_mode()
def encode_texts(model: Meter, ids: Sequence[Sequence[int]], at_once: int | None = None) -> list[EncodedTexts]:
    """Token ids of each text, special tokens included -> all texts, each encoded once, in groups of one length of at
    most `at_once`: half of a batch of pairs, as a text's share of the work is a small part of a picture's."""
    device, _ = place_of(model)
    at_once = max(1, pairs_at_once(model) // 2) if at_once is None else at_once
    lengths = np.array([len(row) for row in ids])
    encoded = []
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        for start in range(0, len(same), at_once):
            part = same[start : start + at_once]
            rows, mask = pad([ids[n] for n in part], model.config.text.pad_id, device)
            encoded.append(EncodedTexts(model.encode_text(rows, mask), mask, torch.from_numpy(part)))
    return encoded


@torch.inference_mode()
def match_scores(
    model: Meter,
    image: Tensor,
    texts: Sequence[EncodedTexts],
    at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """image [P,V,D] encoded pictures -> [P,T] float32 on the host, what each pair is ranked by: the rank head's score,
    or of a model without that head the log-odds that the ITM head gives.

    The log-odds rank pairs as the probability of a match does, without the ties of probabilities that round to 1. (The
    published loop ranks by the score of class 1 alone; that of class 0, its mirror image but for how both started, is
    taken off here.) progress: told how many pairs are done since it was told last.
    """
    at_once = pairs_at_once(model) if at_once is None else at_once
    scores = torch.empty(len(image), sum(len(part.columns) for part in texts))
    for part in texts:
        first = 0
        for found in ranked(model, image, part, at_once):
            scores[first : first + len(found), part.columns] = found.cpu()
            first += len(found)
            if progress is not None:
                progress(found.numel())
    return scores


def ranked(model: Meter, image: Tensor, part: EncodedTexts, at_once: int) -> Iterator[Tensor]:
    """The scores of image [P,V,D] against a group of texts, of as many pictures at a time as make `at_once` pairs:
    [p,C] float32."""
    count = len(part.columns)
    each = torch.arange(count, device=image.device)
    for some in image.split(max(1, at_once // count)):
        pictures = torch.arange(len(some), device=image.device).repeat_interleave(count)
        wanted = Part(Need.CLS, len(pictures), pictures, each.repeat(len(some)))
        (fused,) = model.fuse_parts(part.features, some, part.mask, (wanted,))
        yield rank(model, fused.cls).view(len(some), count)


def rank(model: Meter, cls: Tensor) -> Tensor:
    """What pairs are ranked by: cls [B,width] -> [B] float32. Raises ValueError for a model without a head for it."""
    if model.rank_head is not None:
        return model.rank_head(cls).squeeze(-1).float()
    check_head(model)
    logits = model.itm_head(cls.to(model.itm_head.weight.dtype)).float()
    return logits[:, MATCH] - logits[:, 1 - MATCH]


def check_head(model: Meter) -> None:
    """Raise ValueError for a model that cannot rank."""
    if model.rank_head is None and model.itm_head is None:
        raise ValueError(
            "retrieval ranks by the rank head or the ITM head, both of which this model lacks: train with "
            "objectives.names=mlm,itm, or fine-tune such a model on retrieval"
        )


# ------------------------------------------------------------------------------------------------- what is to be scored


@dataclass(frozen=True)
class Split:
    """Pictures with captions: samples, the first sample of each picture; captions of each, one or more; different: all
    captions, equal ones once, in order."""

    sources: Sources
    samples: list[int]
    captions: list[list[str]]
    different: list[str]

    @staticmethod
    def of(sources: Sources, max_pictures: int | None, skipped: Counter) -> "Split":
        """The pictures (that many, spread evenly) of `sources`; captions that are no text are counted in `skipped`.
        Raises ValueError for fewer than two."""
        groups = [(int(g[0]), read_captions(sources, g, skipped)) for g in samples_by_picture(sources, max_pictures)]
        groups = [(first, captions) for first, captions in groups if captions]
        if len(groups) < 2:
            raise ValueError(f"retrieval needs two captioned pictures or more; skipped: {dict(skipped)}")
        captions = [texts for _, texts in groups]
        different = list(dict.fromkeys(text for texts in captions for text in texts))
        return Split(sources, [first for first, _ in groups], captions, different)

    def __len__(self) -> int:
        """Pictures."""
        return len(self.samples)

    def read(self, rows: Sequence[int], backend: ImageBackend, max_pixels: int) -> tuple[Tensor, list[str | None]]:
        """Pictures [P,3,S,S], and why each cannot be read (None: it can; else it is zeros)."""
        side = backend.transform.size
        pixels, causes = torch.zeros(len(rows), 3, side, side), [None] * len(rows)
        for place, row in enumerate(rows):
            try:
                pixels[place] = read_picture(self.sources.read(self.samples[row]).image, backend, max_pixels)
            except BadImage as error:
                causes[place] = error.cause
        return pixels, causes


@torch.inference_mode()
def score_pictures(
    model: Meter, split: Split, rows: Sequence[int], texts: Sequence[EncodedTexts], backend: ImageBackend,
    max_pixels: int = DEFAULT_MAX_PIXELS, progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[str | None]]:  # fmt: skip
    """Some pictures against all texts: scores [P,T] float32 on the host, NaN where one cannot be read, and why."""
    pixels, causes = split.read(rows, backend, max_pixels)
    scores = match_scores(model, model.encode_image(pixels.to(*place_of(model))), texts, progress=progress)
    scores[[place for place, cause in enumerate(causes) if cause is not None]] = torch.nan
    return scores, causes


def readable(scores: Tensor) -> list[int]:
    """Rows of scores [N,T] that are of readable pictures. Raises ValueError for fewer than two."""
    rows = (~scores[:, 0].isnan()).nonzero().flatten().tolist()
    if len(rows) < 2:
        raise ValueError(f"retrieval needs two readable pictures or more; {len(rows)} of {len(scores)} could be read")
    return rows


# -------------------------------------------------------------------------------------------- while a model is trained


@dataclass(frozen=True)
class HeldOutPictures:
    """What the recall is measured on during training: at most `limit` pictures of `sources`, spread evenly."""

    sources: Sources
    text: TextPipeline
    backend: ImageBackend
    limit: int
    max_pixels: int = DEFAULT_MAX_PIXELS


@torch.inference_mode()
def score_held_out(
    module: nn.Module, held_out: HeldOutPictures, device: torch.device | str, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """{"retrieval": {"ir_r1", ..., "tr_r10", "pictures", "captions", "skipped"}}, the same everywhere. Collective.

    module: has the `model`; put in eval mode meanwhile. Every process encodes all texts and its share of the pictures
    and calls the parts of the model as often as every other, as ZeRO-3 needs. Pictures that cannot be read are left out
    with their captions. Raises ValueError for fewer than two readable ones.
    """
    ranks, own_rank = (dist.get_world_size(), dist.get_rank()) if _in_group() else (1, 0)
    skipped: Counter = Counter()
    split = Split.of(held_out.sources, held_out.limit, skipped)
    share = -(-len(split) // ranks)
    rows = [min(own_rank * share + place, len(split) - 1) for place in range(share)]  # the last one fills up
    model, was_training = module.model, module.training
    module.eval()
    try:
        texts = encode_texts(model, held_out.text.encode(split.different))
        blocks = [rows[start : start + PICTURES_PER_BLOCK] for start in range(0, share, PICTURES_PER_BLOCK)]
        scores = [
            score_pictures(model, split, block, texts, held_out.backend, held_out.max_pixels)[0] for block in blocks
        ]
    finally:
        module.train(was_training)
    table = _gathered(torch.cat(scores).to(device), ranks).cpu()[: len(split)]
    kept = readable(table)
    found = Retrieval.of(table, kept, split.captions).result()
    counts = {"pictures": len(kept), "captions": found["captions"], "skipped": len(split) - len(kept)}
    return {"retrieval": {**found["retrieval"], **counts}}


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathered(own: Tensor, ranks: int) -> Tensor:
    """Rows [n,T] of every process, in the order of ranks. Collective."""
    if ranks == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)
