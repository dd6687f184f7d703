"""Samples that can be used: read, checked, the bad replaced or left out, their pictures decoded.

Knows one sample source and one image back end; knows no objective and no batch. A replacement is a pure function of
(seed, sample number), so every division of a global batch makes the same ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.image_check import BadImage, check_image
from meter_fast.data.images import BatchDecodeError, ImageBackend
from meter_fast.data.order import mix
from meter_fast.data.randaugment import RandAugment

BAD_IN_A_ROW = 100  # so many unusable samples one after another are no bad luck but a broken data set or set-up
ATTEMPTS = 10 * BAD_IN_A_ROW  # draws of a replacement, those included that show the partner's picture
REPLACE = 1  # what a random number is for: each purpose has its own stream


class BadDataError(ValueError):
    """Too many samples cannot be used: causes, counts and the first names."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A sample that was not used: why, and which (with the decoder's or check's own words)."""

    cause: str
    name: str


@dataclass
class Prepared:
    """A micro-batch of the task's kind, or None when none of its samples could be used; what was skipped on the way."""

    batch: Any
    skips: list[Skip] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sample that passed the checks of its bytes and its text. sample: as its source gave it."""

    index: int
    picture: int
    image: np.ndarray
    text: str
    sample: Any


class DecodeFailed(Exception):
    """Some chosen pictures turned out undecodable (they are noted): choose again. errors: by their places."""

    def __init__(self, errors: Mapping[int, BadImage]):
        super().__init__(f"{len(errors)} pictures cannot be decoded")
        self.errors = errors


class SampleReader:
    """Gives samples that can be used. Safe to use from several threads when the image back end is.

    sources: what `Sources` is; its samples have `image`, `text`, `name` and `images`, all pictures of the sample, of
    which `image` is the first. replace: put another sample in place of a bad one (training); False leaves it out
    (evaluation). augment: what pictures undergo (training), None leaves them.
    """

    def __init__(
        self,
        sources: Any,
        images: ImageBackend,
        seed: int,
        max_image_pixels: int,
        replace: bool,
        augment: RandAugment | None = None,
    ):
        self.sources, self.images, self.augment = sources, images, augment
        self.seed, self.replace = seed, replace
        self.max_image_pixels = max_image_pixels
        self._undecodable: dict[int, Skip] = {}  # found by decoding; kept, so that one picture costs a batch only once

    def usable(
        self, index: int, picture: int, taken: int | None, skips: list[Skip], captioned: bool = True
    ) -> Chosen | None:
        """The sample, or the first of its replacements that is good: a pure function of (seed, index) and `taken`."""
        found = self._check(index, captioned)
        if not isinstance(found, Skip):
            return Chosen(index, picture, *found)
        skips.append(found)
        if not self.replace:
            return None
        row = [found]
        for candidate in self.draws(REPLACE, index):
            picture = int(self.sources.image_ids(np.array([candidate]))[0])
            if picture == taken:
                continue
            found = self._check(candidate, captioned)
            if not isinstance(found, Skip):
                return Chosen(candidate, picture, *found)
            skips.append(found)
            row.append(found)
            if len(row) == BAD_IN_A_ROW:
                break
        raise BadDataError(describe_skips(f"{len(row)} samples in a row could not be used", row))

    def draws(self, purpose: int, number: int, of: int | None = None) -> list[int]:
        """Samples, or numbers below `of`, drawn uniformly for one purpose and one number, attempt after attempt."""
        drawn = mix((self.seed, purpose, number), np.arange(ATTEMPTS)) % np.uint64(of or len(self.sources))
        return drawn.astype(np.int64).tolist()

    def _check(self, index: int, captioned: bool) -> tuple[np.ndarray, str, Any] | Skip:
        """The encoded picture, the text and all of a sample that can be used; else why it cannot."""
        known = self._undecodable.get(index)
        if known is not None:
            return known
        sample = self.sources.read(index)
        try:
            for image in sample.images:
                check_image(image, self.max_image_pixels)
            return sample.image, check_caption(sample.text) if captioned else "", sample
        except (BadImage, BadCaption) as error:
            return _skip(sample, error)

    def refuse(self, chosen: Chosen, error: BadImage) -> None:
        """Note that a picture of the sample cannot be decoded: it is not chosen again."""
        self._undecodable[chosen.index] = _skip(chosen.sample, error)

    def decode(self, chosen: Sequence[Chosen], positions: Sequence[int]) -> torch.Tensor:
        """[n,3,S,S]. positions [n]: of the samples in the stream, which with their pictures key the augmentation.

        When the batch fails, each picture is decoded alone to find those at fault; raises DecodeFailed if there are
        any, after which they are known and not chosen again."""
        encoded = [sample.image for sample in chosen]
        operations = None
        if self.augment is not None:
            places = zip(positions, chosen, strict=True)
            operations = [self.augment.operations(int(position), sample.picture) for position, sample in places]
        try:
            return self.images.decode(encoded, operations)
        except BatchDecodeError:
            pictures, failed = [], {}
            for number, sample in enumerate(chosen):
                try:
                    own = operations[number] if operations else ()
                    pictures.append(self.images.decode_one(sample.image, own))
                except BadImage as error:
                    self.refuse(sample, error)
                    failed[number] = error
            if failed:
                raise DecodeFailed(failed) from None
            self.images.host_decoded["picture of a failed batch"] += len(
                pictures
            )  # the CPU back end could read them all
            return torch.stack(pictures)


def _skip(sample: Any, error: BadImage | BadCaption) -> Skip:
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
