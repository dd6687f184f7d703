"""Held-out pictures to look at: a hidden word and its fills, match probabilities, and where the word looks.

Knows a model and encoded pictures. Knows nothing of pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from meter_fast.data.images import ImageTransform, denormalise
from meter_fast.models.meter import Meter
from meter_fast.predict import MaskedCaption, fill, hide_word, match, word_attention
from meter_fast.score import Block, find_words

SHOWN_PIXELS = 256
AMBER, GLOW_STRENGTH, DIMMED = (255.0, 176.0, 32.0), 0.72, 0.75
FULL_GLOW = 3.0  # even shares of attention at which the glow is full, if none has more


@dataclass(frozen=True)
class Claim:
    """A caption, what it is to the picture ("true", "one word changed", "of another picture"), and the probability that
    the model gives it of belonging to the picture."""

    caption: str
    is_what: str
    probability: float


@dataclass(frozen=True)
class Example:
    """One picture of the page. attention: the picture, aglow where the hidden word looks; fills: (word, probability),
    best first."""

    kind: str
    picture: Image.Image
    attention: Image.Image
    masked: MaskedCaption
    fills: list[tuple[str, float]]
    claims: list[Claim]


def choose(
    block: Block, tokenizer, kinds: Mapping[str, Sequence[str]], wanted: int
) -> list[tuple[str, int, MaskedCaption]]:
    """(kind, picture, hidden word) of up to `wanted` pictures, each picture once, the kinds in turn. Decided by the
    order of the block alone, never by what the model says."""
    waiting: dict[str, list[tuple[int, MaskedCaption]]] = {kind: [] for kind in kinds}
    for caption, picture in zip(block.captions, block.picture):
        for kind, start, end in find_words(caption, kinds):
            masked = hide_word(tokenizer, caption, start, end)
            if masked is not None:
                waiting[kind].append((int(picture), masked))
    chosen: list[tuple[str, int, MaskedCaption]] = []
    used: set[int] = set()
    found = True
    while found and len(chosen) < wanted:
        found = False
        for kind, rows in waiting.items():
            row = next((r for r in rows if r[0] not in used), None)
            if row is not None and len(chosen) < wanted:
                used.add(row[0])
                chosen.append((kind, *row))
                found = True
    return chosen


def examples(
    model: Meter,
    tokenizer,
    block: Block,
    transform: ImageTransform,
    kinds: Mapping[str, Sequence[str]],
    wanted: int = 12,
) -> list[Example]:
    """What the model says of up to `wanted` pictures of the block."""
    chosen = choose(block, tokenizer, kinds, wanted)
    if not chosen:
        return []
    pictures = [picture for _, picture, _ in chosen]
    image = block.features[torch.tensor(pictures, device=block.features.device)]
    captions = [masked for _, _, masked in chosen]
    fills = fill(model, tokenizer, image, captions) if model.mlm_head is not None else [[] for _ in captions]
    maps = word_attention(model, tokenizer, image, captions)
    shown = [to_image(block, picture, transform) for picture in pictures]
    claims = _claims(model, tokenizer, image, chosen, kinds)
    return [
        Example(kind, shown[i], glow(shown[i], maps[i].cpu().numpy()), masked, fills[i], claims[i])
        for i, (kind, _, masked) in enumerate(chosen)
    ]


def _claims(
    model: Meter, tokenizer, image: torch.Tensor, chosen: Sequence[tuple[str, int, MaskedCaption]], kinds: Mapping
) -> list[list[Claim]]:
    """Three captions for each picture: its own, with one word changed, and the next picture's."""
    if model.itm_head is None:
        return [[] for _ in chosen]
    texts = []
    for i, (kind, _, masked) in enumerate(chosen):
        words = [word for word in kinds[kind] if word != masked.word.lower()]
        changed = masked.shown(words[i % len(words)]) if words else None
        other = chosen[(i + 1) % len(chosen)][2].caption
        texts.append([("true", masked.caption), ("one word changed", changed), ("of another picture", other)])
    flat = [(i, what, text) for i, rows in enumerate(texts) for what, text in rows if text is not None]
    rows = torch.tensor([i for i, _, _ in flat], device=image.device)
    says = match(model, tokenizer, image[rows], [text for _, _, text in flat]).tolist()
    claims: list[list[Claim]] = [[] for _ in chosen]
    for (i, what, text), probability in zip(flat, says):
        claims[i].append(Claim(text, what, probability))
    return claims


def to_image(block: Block, picture: int, transform: ImageTransform) -> Image.Image:
    """The picture as the model saw it, large enough to look at."""
    pixels = denormalise(block.pixels[picture], transform).permute(1, 2, 0).cpu().numpy()
    shown = Image.fromarray(np.ascontiguousarray(pixels))
    if shown.width < SHOWN_PIXELS:
        shown = shown.resize((SHOWN_PIXELS, SHOWN_PIXELS), Image.Resampling.LANCZOS)
    return shown


def glow(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """The picture dimmed, with an amber glow where a patch gets more than an even share of `attention` [grid,grid]:
    full at the highest, but not below three even shares, so that a word that looks everywhere makes no glow."""
    excess = attention * attention.size - 1
    heat = Image.fromarray((excess.clip(0) / max(FULL_GLOW - 1, excess.max())).astype(np.float32))
    alpha = GLOW_STRENGTH * np.asarray(heat.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    dimmed = DIMMED * np.asarray(picture, dtype=np.float32)
    return Image.fromarray((dimmed * (1 - alpha) + np.array(AMBER) * alpha).clip(0, 255).astype(np.uint8))
