"""Held-out scores of what a decoder writes: hidden spans, and captions of pictures alone. Each stands beside the same
with exchanged pictures and beside its chance level.

Knows models and blocks of encoded pictures. Knows nothing of sources, runs or reports.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meter_fast.data.spans import Denoiser
from meter_fast.models.meter import Meter, Need
from meter_fast.predict import MAX_TEXT_LENGTH, caption, pad, place_of

TEXTS_PER_BATCH = 128


class SpanScore:
    """Counts over blocks: is the model's first choice for a token of a hidden span that token, where all tokens before
    it are given? Sentinels and ends are not asked. Which spans are hidden depends on the caption's number alone."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.right = self.shuffled = self.captions = 0
        self.tokens: Counter[int] = Counter()

    @torch.inference_mode()
    def add(self, model: Meter, tokenizer, block, max_length: int = MAX_TEXT_LENGTH) -> None:
        """block: a `score.Block`."""
        rows = tokenizer(block.captions, truncation=True, max_length=max_length)["input_ids"]
        chances = map(np.random.default_rng, range(self.captions, self.captions + len(rows)))
        self.captions += len(rows)
        hidden = [self.denoiser.denoising(ids, chance) for ids, chance in zip(rows, chances, strict=True)]
        by_length = np.argsort([len(read) for read, _ in hidden], kind="stable")
        for start in range(0, len(rows), TEXTS_PER_BATCH):
            part = by_length[start : start + TEXTS_PER_BATCH]
            found = _written_right(
                model, tokenizer, block.features, [hidden[n] for n in part], (block.picture[part], block.other()[part])
            )
            asked = ~np.isin(found[0], [*self.denoiser.sentinels, self.denoiser.last_id])
            self.tokens.update(found[0][asked].tolist())
            self.right += int(found[1][asked].sum())
            self.shuffled += int(found[2][asked].sum())

    def result(self) -> dict[str, float]:
        """accuracy, shuffled (with another scene's picture), chance (the most frequent token), count of tokens."""
        count = self.tokens.total()
        return {
            "accuracy": self.right / max(count, 1),
            "shuffled": self.shuffled / max(count, 1),
            "chance": max(self.tokens.values(), default=0) / max(count, 1),
            "count": count,
        }


def _written_right(
    model: Meter, tokenizer, features: Tensor, hidden: Sequence[tuple[np.ndarray, np.ndarray]], pictures: Sequence
) -> list[np.ndarray]:
    """The tokens to write [M], and for each of the choices of pictures [B] whether they come first [M] bool."""
    device, _ = place_of(model)
    ids, mask = pad([read.tolist() for read, _ in hidden], tokenizer.pad_token_id, device)
    targets, real = pad([written.tolist() for _, written in hidden], tokenizer.pad_token_id, device)
    text = model.encode_text(ids, mask)
    found = [targets[real].cpu().numpy()]
    for choice in pictures:
        fused = model.fuse(text, features[torch.from_numpy(choice).to(device)], mask, need=Need.BOTH)
        rows = model.decoder(model.decoder.inputs(targets), fused.text, fused.image, mask, real.sum(1))
        found.append((model.lm_head(rows[real]).argmax(-1) == targets[real]).cpu().numpy())
    return found


class CaptionScore:
    """Counts over blocks: does the caption that the model writes of a picture name a colour and a shape, and only such
    as one thing in the picture has? What is in a picture is what its reference captions name.

    The drawn scenes have references of most of their things, not of all: now and then a right caption counts as wrong.
    """

    def __init__(self, colours: Sequence[str], shapes: Sequence[str]) -> None:
        self.pattern = re.compile(rf"\b({'|'.join(colours)})\s+({'|'.join(shapes)})(?:e?s)?\b", re.IGNORECASE)
        self.right = self.shuffled = self.count = 0
        self.things: Counter[tuple[str, str]] = Counter()

    @torch.inference_mode()
    def add(self, model: Meter, tokenizer, block, max_length: int = MAX_TEXT_LENGTH) -> None:
        """block: a `score.Block`."""
        references: list[set[tuple[str, str]]] = [set() for _ in block.features]
        for text, picture in zip(block.captions, block.picture.tolist(), strict=True):
            references[picture] |= self.named(text)
        for start in range(0, len(block.features), TEXTS_PER_BATCH):
            texts = caption(model, tokenizer, block.features[start : start + TEXTS_PER_BATCH], max_length=max_length)
            for place, text in enumerate(texts, start):
                named = self.named(text)
                self.right += bool(named) and named <= references[place]
                self.shuffled += bool(named) and named <= references[(place + 1) % len(references)]
        self.count += len(references)
        self.things.update(thing for things in references for thing in things)

    def named(self, text: str) -> set[tuple[str, str]]:
        """The (colour, shape) pairs that stand side by side in a text, in singular or plural."""
        return {(colour.lower(), shape.lower()) for colour, shape in self.pattern.findall(text)}

    def result(self) -> dict[str, float]:
        """accuracy, shuffled (the same captions, another scene's references), chance (always the most frequent thing),
        count of pictures."""
        count = max(self.count, 1)
        return {
            "accuracy": self.right / count,
            "shuffled": self.shuffled / count,
            "chance": max(self.things.values(), default=0) / count,
            "count": self.count,
        }


def scores_of(denoiser: Denoiser | None, kinds: Mapping[str, Sequence[str]]) -> dict[str, SpanScore | CaptionScore]:
    """By objective, what is scored of a model that was trained on the denoiser's objectives; captions where `kinds` has
    colours and shapes."""
    names = denoiser.names if denoiser is not None else ()
    scores: dict[str, SpanScore | CaptionScore] = {}
    if "span_denoising" in names:
        scores["span_denoising"] = SpanScore(denoiser)
    if "caption" in names and {"colour", "shape"} <= set(kinds):
        scores["caption"] = CaptionScore(kinds["colour"], kinds["shape"])
    return scores
