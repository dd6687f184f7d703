"""One micro-batch from the numbers of its samples: read, check, replace the bad, tokenise, mask, decode, pair for ITM.

Knows one sample source, one text pipeline, one image back end. Knows nothing of steps, ranks or threads: a micro-batch
is a pure function of (seed, sample numbers, stream positions), so every division of a global batch gives the same
pairs, masks, labels and replacements.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from meter_fast.data.batch import PretrainBatch, TextToText
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage, check_image
from meter_fast.data.images import BatchDecodeError, ImageBackend
from meter_fast.data.order import mix
from meter_fast.data.sources import Sources
from meter_fast.data.tables import Sample
from meter_fast.data.text import BadCaption, TextPipeline, check_caption

NEGATIVES = ("batch", "dataset")
BAD_IN_A_ROW = 100  # so many unusable samples one after another are no bad luck but a broken data set or set-up
ATTEMPTS = 10 * BAD_IN_A_ROW  # draws of a replacement, those included that show the partner's picture

# What a random number is for: each purpose has its own stream.
_REPLACE, _COIN, _FALSE_PICTURE, _MASK, _SPANS = 1, 2, 3, 4, 7


class BadDataError(ValueError):
    """Too many samples cannot be used: causes, counts and the first names."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that was not used: why, and which (with the decoder's or check's own words)."""

    cause: str
    name: str


@dataclass
class Prepared:
    """A micro-batch, or None when none of its samples could be used, and what was skipped while making it."""

    batch: PretrainBatch | None
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A sample that passed the checks of its bytes and its caption."""

    index: int
    picture: int
    image: np.ndarray
    text: str


class _DecodeFailed(Exception):
    """Some chosen pictures turned out undecodable (they are noted): choose again."""


class Assembler:
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    negatives: "batch", the false picture of a pair (2i, 2i+1) is the partner's, or "dataset", it is drawn uniformly
    from all (picture, caption) items, as published (so once in a while it is the true picture).
    replace: put another sample in place of a bad one (training); False leaves it out (evaluation).
    Raises ValueError for an unknown kind of negatives.
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        seed: int,
        negatives: str = "batch",
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
    ):
        if negatives not in NEGATIVES:
            raise ValueError(f"objectives.itm_negatives={negatives!r}: choose one of {', '.join(NEGATIVES)}")
        self.sources, self.text, self.images = sources, text, images
        self.seed, self.negatives, self.replace = seed, negatives, replace
        self.max_image_pixels = max_image_pixels
        self._undecodable: dict[int, Skip] = {}  # found by decoding; kept, so that one picture costs a batch only once

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64; positions [m] int64, ascending: their places in the endless stream, which key all chances.

        Raises BadDataError after BAD_IN_A_ROW unusable samples in a row.
        """
        while True:
            skips: list[Skip] = []
            chosen = self._choose(samples, skips)
            kept = [place for place, sample in enumerate(chosen) if sample is not None]
            if not kept:
                return Prepared(None, skips)
            chosen = [chosen[place] for place in kept]
            labels, partners = self._pairing(positions[kept])
            false = [self._false_picture(p, skips) for p in self._without_match(positions[kept], labels)]
            try:
                images = self._decode(chosen)
                false_images = self._decode(false) if false else None
            except _DecodeFailed:
                continue
            fields = self._texts(chosen, positions[kept])
            return Prepared(
                PretrainBatch(
                    images=images,
                    **fields,
                    itm_labels=torch.from_numpy(labels),
                    itm_images=torch.from_numpy(partners),
                    false_images=false_images,
                    sample_ids=torch.tensor([sample.index for sample in chosen]),
                ),
                skips,
            )

    # ------------------------------------------------------------------------------------ choosing and replacing

    def _choose(self, samples: np.ndarray, skips: list[Skip]) -> list[_Chosen | None]:
        """Each sample, or what takes its place. Within a pair a replacement never shows the partner's picture."""
        pictures = self.sources.image_ids(samples).tolist()
        chosen: list[_Chosen | None] = []
        for place, index in enumerate(samples.tolist()):
            partner = place ^ 1
            taken = None
            if partner < len(pictures) and self.negatives == "batch":
                taken = pictures[partner]
            sample = self._usable(index, pictures[place], taken, skips)
            if sample is not None:
                pictures[place] = sample.picture
            chosen.append(sample)
        return chosen

    def _usable(
        self, index: int, picture: int, taken: int | None, skips: list[Skip], captioned: bool = True
    ) -> _Chosen | None:
        """The sample, or the first of its replacements that is good: a pure function of (seed, index) and `taken`."""
        found = self._check(index, captioned)
        if not isinstance(found, Skip):
            return _Chosen(index, picture, *found)
        skips.append(found)
        if not self.replace:
            return None
        row = [found]
        for candidate in self._draws(_REPLACE, index):
            picture = int(self.sources.image_ids(np.array([candidate]))[0])
            if picture == taken:
                continue
            found = self._check(candidate, captioned)
            if not isinstance(found, Skip):
                return _Chosen(candidate, picture, *found)
            skips.append(found)
            row.append(found)
            if len(row) == BAD_IN_A_ROW:
                break
        raise BadDataError(describe_skips(f"{len(row)} samples in a row could not be used", row))

    def _draws(self, purpose: int, number: int) -> list[int]:
        """Samples drawn uniformly for one purpose and one number, attempt after attempt."""
        drawn = mix((self.seed, purpose, number), np.arange(ATTEMPTS)) % np.uint64(len(self.sources))
        return drawn.astype(np.int64).tolist()

    def _check(self, index: int, captioned: bool) -> tuple[np.ndarray, str] | Skip:
        """The encoded picture and the caption of a sample that can be used; else why it cannot."""
        known = self._undecodable.get(index)
        if known is not None:
            return known
        sample = self.sources.read(index)
        try:
            check_image(sample.image, self.max_image_pixels)
            return sample.image, check_caption(sample.text) if captioned else ""
        except (BadImage, BadCaption) as error:
            return _skip(sample, error)

    def _decode(self, chosen: Sequence[_Chosen]) -> torch.Tensor:
        """[n,3,S,S]. When the batch fails, each picture is decoded alone to find those at fault."""
        encoded = [sample.image for sample in chosen]
        try:
            return self.images.decode(encoded)
        except BatchDecodeError:
            pictures, failed = [], False
            for sample in chosen:
                try:
                    pictures.append(self.images.decode_one(sample.image))
                except BadImage as error:
                    self._undecodable[sample.index] = _skip(self.sources.read(sample.index), error)
                    failed = True
            if failed:
                raise _DecodeFailed from None
            self.images.host_decoded["picture of a failed batch"] += len(
                pictures
            )  # the CPU back end could read them all
            return torch.stack(pictures)

    # ------------------------------------------------------------------------------------ image-text matching

    def _pairing(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ITM labels [n] and pictures [n], int64: of positions 2i and 2i+1 one matches, which one a coin says.

        With negatives="batch" a sample whose partner is not here (left out in evaluation) matches.
        """
        labels = (positions % 2 == (mix((self.seed, _COIN), positions // 2) & np.uint64(1)).astype(np.int64)).astype(
            np.int64
        )
        pictures = np.arange(len(positions))
        if self.negatives == "dataset":
            pictures[labels == 0] = len(positions) + np.arange(np.count_nonzero(labels == 0))
            return labels, pictures
        place = {position: number for number, position in enumerate(positions.tolist())}
        for number, position in enumerate(positions.tolist()):
            partner = place.get(position ^ 1)
            if partner is None:
                labels[number] = 1
            elif labels[number] == 0:
                pictures[number] = partner
        return labels, pictures

    def _without_match(self, positions: np.ndarray, labels: np.ndarray) -> list[int]:
        """Positions that need a picture from the data set."""
        return positions[labels == 0].tolist() if self.negatives == "dataset" else []

    def _false_picture(self, position: int, skips: list[Skip]) -> _Chosen:
        """A picture drawn for one position; of a bad one, its replacement."""
        index = self._draws(_FALSE_PICTURE, position)[0]
        picture = int(self.sources.image_ids(np.array([index]))[0])
        return self._usable(index, picture, None, skips, captioned=False)

    # ------------------------------------------------------------------------------------ text

    def _texts(self, chosen: Sequence[_Chosen], positions: np.ndarray) -> dict[str, torch.Tensor | TextToText]:
        """Token ids, mask, what MLM hides, and what a decoder reads and writes, of a micro-batch."""
        ids = self.text.encode([sample.text for sample in chosen])
        chance = _PositionRandom(self.seed, _MASK)
        hidden = [self.text.mask(text, chance.at(p)) for text, p in zip(ids, positions.tolist(), strict=True)]
        text_ids, text_mask = self.text.pad(ids)
        masked_ids, _ = self.text.pad([masked for masked, _, _ in hidden])
        length = text_ids.shape[1]
        rows = np.concatenate([places + number * length for number, (_, places, _) in enumerate(hidden)])
        labels = np.concatenate([labels for _, _, labels in hidden])
        return {
            "text_ids": text_ids,
            "text_mask": text_mask,
            "masked_ids": masked_ids,
            "masked_rows": torch.from_numpy(rows),
            "masked_labels": torch.from_numpy(labels),
            "text_rows": text_mask.flatten().nonzero().flatten(),
            **self.text.denoise(ids, map(_PositionRandom(self.seed, _SPANS).at, positions.tolist())),
        }


class _PositionRandom:
    """numpy's Philox, keyed by (seed, purpose) and counting from a stream position: one generator, set anew each time,
    which is ten times cheaper than making one."""

    def __init__(self, seed: int, purpose: int):
        self._bits = np.random.Philox(key=np.array([seed & (2**64 - 1), purpose], np.uint64))
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, position: int) -> np.random.Generator:
        """The generator for one position; valid until the next call."""
        self._start["state"]["counter"][:] = (0, 0, position, 0)
        self._bits.state = self._start
        return self._generator


def _skip(sample: Sample, error: BadImage | BadCaption) -> Skip:
    detail = f" ({error.detail})" if error.detail else ""
    return Skip(error.cause, f"{sample.name}{detail}")


def describe_skips(what: str, skips: Sequence[Skip]) -> str:
    """A message: what happened, how often each cause, and the first names."""
    counts = Counter(skip.cause for skip in skips)
    causes = []
    for cause, count in counts.most_common():
        first = [skip.name for skip in skips if skip.cause == cause][:3]
        causes.append(f"{cause}: {count}, first {', '.join(first)}")
    return f"{what}. {'; '.join(causes)}"
