"""Held-out scores of what only the picture tells.

Each word of a kind (colour, count ...) is hidden alone, and captions are matched with their own and with another
picture. Each score stands beside its chance level, and the words' beside the same with exchanged pictures.

Knows models, sources and image back ends. Knows nothing of runs, reports or training.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage, check_image
from meter_fast.data.images import BatchDecodeError, ImageBackend, denormalise
from meter_fast.data.spans import Denoiser
from meter_fast.data.text import CHARACTERS_PER_TOKEN
from meter_fast.models.meter import Meter, Need
from meter_fast.predict import (
    MATCH,
    MAX_TEXT_LENGTH,
    MaskedCaption,
    fill,
    flat_places,
    hidden_logits,
    hide_word,
    pad,
    place_of,
)
from meter_fast.score_written import scores_of

PICTURES_PER_BLOCK = 256
PAIRS_PER_BATCH = 128
MAX_CHARACTERS = CHARACTERS_PER_TOKEN * MAX_TEXT_LENGTH  # of a caption; what follows is beyond the last token


# --------------------------------------------------------------------------------------- pictures, each encoded once


@dataclass(frozen=True)
class Block:
    """Some pictures of a split and all their captions.

    features [P,V,D]: the encoded pictures; pixels [P,3,H,W]: what was encoded; captions: N texts;
    picture [N] int64: which of the P pictures each belongs to. No two of the P are the same picture.
    """

    features: Tensor
    pixels: Tensor
    captions: list[str]
    picture: np.ndarray

    def other(self) -> np.ndarray:
        """A picture that is not the caption's own, for each caption: the block's next one, [N] int64."""
        return (self.picture + 1) % len(self.features)


def held_out_blocks(
    model: Meter,
    sources,
    backend: ImageBackend,
    skipped: Counter,
    max_pictures: int | None = None,
    pictures_per_block: int = PICTURES_PER_BLOCK,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    naming: Sequence[str] = (),
) -> Iterator[Block]:
    """The pictures of `sources` with their captions, in the order of their ids, each encoded once.

    max_pictures: take that many, spread evenly. naming: take only captions that hold one of these phrases. Pictures
    that cannot be read are left out with their captions and counted in `skipped` by cause, and so are captions that are
    no text. A block has two pictures or more. Raises ValueError if there are fewer than two good ones.
    """
    kept: list[tuple[Tensor, list[str]]] = []
    for group in samples_by_picture(sources, max_pictures):
        try:
            pixels = read_picture(sources.read(int(group[0])).image, backend, max_pixels)
        except BadImage as error:
            skipped[error.cause] += 1
            continue
        captions = read_captions(sources, group, skipped, naming)
        if captions:
            kept.append((pixels, captions))
        if len(kept) == pictures_per_block + 2:  # two stay behind, so that the last block has two or more
            yield _encode_block(model, kept[:-2])
            kept = kept[-2:]
    if len(kept) < 2:
        raise ValueError(
            f"held-out scores need two readable pictures or more; {len(kept)} found, skipped: {dict(skipped)}"
        )
    yield _encode_block(model, kept)


def samples_by_picture(sources, max_pictures: int | None = None) -> list[np.ndarray]:
    """For each picture of `sources`, in the order of their ids, its samples [n] int64. max_pictures: take that many (2
    at least), spread evenly."""
    items = np.argsort(sources.image_ids(np.arange(len(sources))), kind="stable")
    groups = np.split(items, np.flatnonzero(np.diff(sources.image_ids(items))) + 1)
    if max_pictures is not None and max_pictures < len(groups):
        groups = [groups[i] for i in np.linspace(0, len(groups) - 1, max(2, max_pictures)).round().astype(int)]
    return groups


def read_picture(encoded: np.ndarray, backend: ImageBackend, max_pixels: int) -> Tensor:
    """One encoded picture -> [3,S,S]. Raises BadImage."""
    check_image(encoded, max_pixels)
    try:
        return backend.decode([encoded])[0]
    except BatchDecodeError:
        return backend.decode_one(encoded)


def read_captions(sources, items: np.ndarray, skipped: Counter, naming: Sequence[str] = ()) -> list[str]:
    """The captions of samples `items`, those with one of the phrases `naming` if there are any; what is no text is
    counted in `skipped` by cause."""
    captions = []
    for item in items:
        try:
            caption = check_caption(sources.read(int(item)).text)[:MAX_CHARACTERS]
            if not naming or any(phrase in caption for phrase in naming):
                captions.append(caption)
        except BadCaption as error:
            skipped[error.cause] += 1
    return captions


@torch.inference_mode()
def _encode_block(model: Meter, kept: Sequence[tuple[Tensor, list[str]]]) -> Block:
    device, dtype = place_of(model)
    pixels = torch.stack([picture for picture, _ in kept]).to(device, dtype)
    features = torch.cat([model.encode_image(part) for part in pixels.split(PAIRS_PER_BATCH)])
    captions = [text for _, texts in kept for text in texts]
    picture = np.repeat(np.arange(len(kept)), [len(texts) for _, texts in kept])
    return Block(features, pixels, captions, picture)


# ------------------------------------------------------------------------------------------------- words and matching


def find_words(caption: str, kinds: Mapping[str, Sequence[str]]) -> list[tuple[str, int, int]]:
    """(kind, start, end) of every whole word of the kinds in a caption, upper or lower case, in order."""
    kind_of = {word.lower(): kind for kind, words in kinds.items() for word in words}
    found = []
    for hit in re.finditer(r"\w+", caption):
        kind = kind_of.get(hit.group().lower())
        if kind is not None:
            found.append((kind, hit.start(), hit.end()))
    return found


class WordScore:
    """Counts over blocks: is the model's first choice for a hidden word the word itself?"""

    def __init__(self, kinds: Mapping[str, Sequence[str]]):
        self.kinds = kinds
        self.right: Counter = Counter()
        self.shuffled: Counter = Counter()
        self.words: dict[str, Counter] = {kind: Counter() for kind in kinds}
        self.cut_off = 0

    def add(self, model: Meter, tokenizer, block: Block, max_length: int = MAX_TEXT_LENGTH) -> None:
        hidden: list[tuple[str, int, MaskedCaption]] = []
        for n, caption in enumerate(block.captions):
            for kind, start, end in find_words(caption, self.kinds):
                masked = hide_word(tokenizer, caption, start, end, max_length)
                if masked is None:
                    self.cut_off += 1
                else:
                    hidden.append((kind, n, masked))
                    self.words[kind][masked.word.lower()] += 1
        hidden.sort(key=lambda row: len(row[2].ids))  # texts of a batch are padded to the longest
        for start in range(0, len(hidden), PAIRS_PER_BATCH):
            part = hidden[start : start + PAIRS_PER_BATCH]
            rows = np.array([n for _, n, _ in part])
            captions = [masked for _, _, masked in part]
            right, shuffled = _filled_right(
                model, tokenizer, block.features, captions, (block.picture[rows], block.other()[rows])
            )
            for (kind, _, _), own, other in zip(part, right, shuffled):
                self.right[kind] += own
                self.shuffled[kind] += other

    def result(self) -> dict[str, dict[str, float]]:
        """Per kind: accuracy, shuffled (the same with another scene's picture), chance (the best constant answer),
        uniform (1 / number of words), count. A kind that no caption holds is left out."""
        scores = {}
        for kind, words in self.words.items():
            count = words.total()
            if count:
                scores[kind] = {
                    "accuracy": self.right[kind] / count,
                    "shuffled": self.shuffled[kind] / count,
                    "chance": max(words.values()) / count,
                    "uniform": 1 / len(self.kinds[kind]),
                    "count": count,
                }
        return scores


@torch.inference_mode()
def _filled_right(
    model: Meter, tokenizer, features: Tensor, captions: Sequence[MaskedCaption], pictures: Sequence[np.ndarray]
) -> list[list[bool]]:
    """For each of the choices of pictures [B]: whether every hidden token is the model's first choice, B booleans."""
    device, _ = place_of(model)
    ids, mask = pad([c.ids for c in captions], tokenizer.pad_token_id, device)
    text = model.encode_text(ids, mask)
    rows, columns, labels = flat_places(captions, device)
    results = []
    for choice in pictures:
        image = features[torch.from_numpy(choice).to(device)]
        wrong = hidden_logits(model, text, image, mask, rows, columns).argmax(-1) != labels
        wrong_captions = torch.zeros(len(captions), dtype=torch.int64, device=device).index_add_(0, rows, wrong.long())
        results.append((wrong_captions == 0).tolist())
    return results


class MatchScore:
    """Counts over blocks: each caption with its own picture and with another, so half of all pairs match."""

    def __init__(self) -> None:
        self.count = self.true_right = self.false_right = 0

    @torch.inference_mode()
    def add(self, model: Meter, tokenizer, block: Block, max_length: int = MAX_TEXT_LENGTH) -> None:
        device, _ = place_of(model)
        rows = tokenizer(block.captions, truncation=True, max_length=max_length)["input_ids"]
        by_length = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, len(rows), PAIRS_PER_BATCH):
            part = by_length[start : start + PAIRS_PER_BATCH]
            ids, mask = pad([rows[n] for n in part], tokenizer.pad_token_id, device)
            text = model.encode_text(ids, mask)
            says = []
            for pictures in (block.picture[part], block.other()[part]):
                image = block.features[torch.from_numpy(pictures).to(device)]
                cls = model.fuse(text, image, mask, need=Need.CLS).cls
                says.append((model.itm_head(cls).argmax(-1) == MATCH).sum().item())
            self.count += len(ids)
            self.true_right += says[0]
            self.false_right += len(ids) - says[1]

    def result(self) -> dict[str, float]:
        """accuracy over all pairs, chance, on_true and on_false (accuracy on either half), count of pairs."""
        count = max(self.count, 1)
        return {
            "accuracy": (self.true_right + self.false_right) / (2 * count),
            "chance": 0.5,
            "on_true": self.true_right / count,
            "on_false": self.false_right / count,
            "count": 2 * self.count,
        }


def score_held_out(
    model: Meter,
    tokenizer,
    sources,
    backend: ImageBackend,
    kinds: Mapping[str, Sequence[str]],
    max_pictures: int | None = None,
    max_length: int = MAX_TEXT_LENGTH,
    pictures_per_block: int = PICTURES_PER_BLOCK,
    naming: Sequence[str] = (),
    denoiser: Denoiser | None = None,
) -> dict:
    """{"itm": {...}, "mlm": {kind: {...}}, "pictures", "captions", "cut_off", "skipped": {cause: count}} of a split, in
    one pass on one process.

    kinds: kind -> its words. naming: score only captions with one of these phrases. A model without one of the heads
    gets no score of it. denoiser: that of the objectives that a decoder was trained on, which are then scored too;
    captions only without `naming`, as they are judged by all that is said of a picture.
    """
    was_training = model.training
    model.eval()
    skipped: Counter = Counter()
    words, matching, written = WordScore(kinds), MatchScore(), scores_of(denoiser, kinds)
    if naming:
        written.pop("caption", None)
    pictures = captions = 0
    max_length = min(max_length, model.config.text.max_length)
    try:
        for block in held_out_blocks(model, sources, backend, skipped, max_pictures, pictures_per_block, naming=naming):
            pictures, captions = pictures + len(block.features), captions + len(block.captions)
            if model.mlm_head is not None:
                words.add(model, tokenizer, block, max_length)
            if model.itm_head is not None:
                matching.add(model, tokenizer, block, max_length)
            for score in written.values():
                score.add(model, tokenizer, block, max_length)
    finally:
        model.train(was_training)
    return {
        **({"itm": matching.result()} if model.itm_head is not None else {}),
        **({"mlm": words.result()} if model.mlm_head is not None else {}),
        **{name: score.result() for name, score in written.items()},
        "pictures": pictures,
        "captions": captions,
        "cut_off": words.cut_off,
        "skipped": dict(skipped),
    }


# ----------------------------------------------------------------------------------------------- one picture to look at


@dataclass(frozen=True)
class Glimpse:
    """A held-out picture while training goes on. image [H,W,3] uint8; caption, with the asked words in brackets; words:
    these words; fills: for each, hidden alone, the model's best (word, probability)."""

    image: np.ndarray
    caption: str
    words: list[str]
    fills: list[list[tuple[str, float]]]


def glimpse(model: Meter, tokenizer, sources, backend: ImageBackend, number: int, words: int = 3) -> Glimpse | None:
    """What the model says of held-out sample `number` (counted round the split); None if it cannot be read. Where
    parameters are partitioned, every rank calls it with the same number."""
    sample = sources.read(number % len(sources))
    try:
        pixels = read_picture(sample.image, backend, DEFAULT_MAX_PIXELS)
        caption = check_caption(sample.text)[:MAX_CHARACTERS]
    except (BadImage, BadCaption):
        return None
    length = min(MAX_TEXT_LENGTH, model.config.text.max_length)
    found = [hit.span() for hit in re.finditer(r"\w+", caption)]
    spans = [span for span in found if span[1] - span[0] > 2] or found  # "a" and "of" tell little
    chosen = sorted(np.random.default_rng(number).permutation(len(spans))[:words].tolist())
    masked = [m for m in (hide_word(tokenizer, caption, *spans[i], length) for i in chosen) if m is not None]
    if not masked:
        return None
    was_training = model.training
    model.eval()
    try:
        device, dtype = place_of(model)
        with torch.inference_mode():
            image = model.encode_image(pixels[None].to(device, dtype)).expand(len(masked), -1, -1)
        fills = fill(model, tokenizer, image, masked)
    finally:
        model.train(was_training)
    shown = caption
    for one in reversed(masked):
        shown = f"{shown[: one.start]}[{one.word}]{shown[one.end :]}"
    picture = denormalise(pixels, backend.transform).permute(1, 2, 0).cpu().numpy()
    return Glimpse(picture, shown, [one.word for one in masked], fills)
