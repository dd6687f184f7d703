"""RandAugment: which operations a training picture undergoes before it is resized, and with what values.

Knows names, values and chances; no pixels and no library (randaugment_pillow.py and randaugment_dali.py carry the
operations out, on the full-size picture in RGB). Source: METER, `transforms/randaug.py`, RandAugment(2, 9), and the
clip_randaug and imagenet_randaug transforms: two of 14 operations, drawn with replacement, each at 9/30 of its range.

"randaugment_published" is that. "randaugment" differs in five operations, whose published values are slips:

- Posterize: the published code turns its strength of 4 * 9/30 = 1.2 into the number of bits that are kept, one. Here
  the strength is the bits that go, round(1.2) = 1, so 7 stay.
- Color, Contrast, Brightness, Sharpness: the published factor is 0.1 + 1.8 * 9/30 = 0.64 always, so pictures only ever
  lose by them. Here it is 1 - 0.9 * 9/30 = 0.73 or 1 + 0.9 * 9/30 = 1.27, with equal chances.

Both drop the alpha of transparent pictures first, as published.
"""

import math
from dataclasses import dataclass

import numpy as np

from meter_fast.data.order import mix

DRAWN = 2  # operations of a picture
NAMES = ("randaugment_published", "randaugment")
_AUGMENT = 8  # purpose of the random numbers (see assemble.py)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation with its value: degrees (Rotate), bits that are kept (Posterize), levels of 255 (Solarize: the
    first that is inverted, SolarizeAdd: what is added), pixels (Translate), 0 where there is none, else a factor."""

    name: str
    value: float


GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
_PUBLISHED = {
    "AutoContrast": (0.0,),
    "Equalize": (0.0,),
    "Rotate": (9.0, -9.0),
    "Posterize": (1.0,),
    "Solarize": (76.8,),
    "SolarizeAdd": (33.0,),
    "Color": (0.64,),
    "Contrast": (0.64,),
    "Brightness": (0.64,),
    "Sharpness": (0.64,),
    "ShearX": (0.09, -0.09),
    "ShearY": (0.09, -0.09),
    "TranslateX": (30.0, -30.0),
    "TranslateY": (30.0, -30.0),
}
VALUES: dict[str, dict[str, tuple[float, ...]]] = {  # each value of an operation is as likely as the others
    "randaugment_published": _PUBLISHED,
    "randaugment": _PUBLISHED | {"Posterize": (7.0,)} | dict.fromkeys(ENHANCEMENTS, (0.73, 1.27)),
}


class RandAugment:
    """Draws the operations of each picture. name: one of NAMES. global_batch: samples of an optimizer step.

    What is drawn is a pure function of (seed, step, picture), so that every division of the global batch gives the
    same pictures, and samples of a step about one picture can share it: one decode, one augmentation. Another step
    draws anew. A replacement of a bad sample is drawn for its own picture. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str, seed: int, global_batch: int):
        if name not in VALUES:
            raise ValueError(f"data.augment={name!r}: choose 'none', {', '.join(map(repr, NAMES))}")
        self.seed, self.global_batch = seed, global_batch
        self._table = [(operation, values) for operation, values in VALUES[name].items()]

    def operations(self, position: int, picture: int) -> tuple[Operation, ...]:
        """The DRAWN operations, in their order, of `picture` at a position of the stream of samples."""
        step = position // self.global_batch
        drawn = []
        for number in mix((self.seed, _AUGMENT, step, picture), np.arange(DRAWN)).tolist():
            name, values = self._table[number % len(self._table)]
            drawn.append(Operation(name, values[(number >> 32) % len(values)]))
        return tuple(drawn)


def affine(operation: Operation, width: int, height: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the new pixel at (x, y) is the old one at (a x + b y + c, d x + e y + f), black beyond the
    border; coordinates of centres are half integers. operation: one of GEOMETRIC."""
    value = operation.value
    if operation.name == "Rotate":  # about the centre, anticlockwise
        cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
        across, down = width / 2, height / 2
        return cos, -sin, across - cos * across + sin * down, sin, cos, down - sin * across - cos * down
    return {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateX": (1, 0, value, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, value),
    }[operation.name]


@dataclass(frozen=True, slots=True)
class Levels:
    """Solarize, SolarizeAdd and Posterize as one map of levels 0..255: add and clip, invert from `threshold` on, keep
    the bits of `mask`."""

    add: int = 0
    threshold: int = 256
    mask: int = 255


def levels(operation: Operation) -> Levels:
    """The map of an operation's levels. operation: Posterize, Solarize or SolarizeAdd."""
    if operation.name == "Posterize":
        return Levels(mask=256 - 2 ** (8 - int(operation.value)))
    if operation.name == "Solarize":
        return Levels(threshold=math.ceil(operation.value))
    return Levels(add=int(operation.value), threshold=128)
