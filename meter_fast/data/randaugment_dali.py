"""The operations of RandAugment inside a DALI graph, on the device of the pictures.

Knows DALI's operators and Pillow's arithmetic. Which operation a picture undergoes is fed from outside, one set of
numbers a sample, and a conditional runs each operation for the samples that need it alone.

Against Pillow: Posterize, Solarize and SolarizeAdd give the same pixels; AutoContrast, Equalize, Color, Contrast,
Brightness and Sharpness are within one level of 255 (rounding); of the geometric ones, which take the nearest pixel,
less than one pixel in a hundred takes its neighbour (Pillow's coordinates have 16 bits after the point).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from meter_fast.data.randaugment import ENHANCEMENTS, GEOMETRIC, Levels, Operation, affine, levels

SMALLEST = 3  # pixels of the shorter side: Sharpness looks at neighbours
_WARP, _LEVELS, _AUTO_CONTRAST, _EQUALIZE = 0, 1, 2, 3
_COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS = 4, 5, 6, 7
_KINDS = {
    **dict.fromkeys(GEOMETRIC, _WARP),
    **dict.fromkeys(("Posterize", "Solarize", "SolarizeAdd"), _LEVELS),
    "AutoContrast": _AUTO_CONTRAST,
    "Equalize": _EQUALIZE,
    "Color": _COLOR,
    "Contrast": _CONTRAST,
    "Brightness": _BRIGHTNESS,
    "Sharpness": _SHARPNESS,
}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_INPUTS = {
    "kind": (types.INT32, np.int32, 0),
    "matrix": (types.FLOAT, np.float32, 2),
    "add": (types.INT32, np.int32, 0),
    "threshold": (types.INT32, np.int32, 0),
    "mask": (types.UINT8, np.uint8, 0),
    "factor": (types.FLOAT, np.float32, 0),
}


def operation_inputs(number: int) -> dict[str, Any]:
    """The graph's inputs for the `number`-th operation of each picture."""
    return {
        name: fn.external_source(name=f"{name}{number}", dtype=kind, ndim=ndim)
        for name, (kind, _, ndim) in _INPUTS.items()
    }


def operation_arrays(
    number: int, operations: Sequence[Operation], sizes: Sequence[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """What to feed for the `number`-th operation of each picture. sizes: width and height of each picture."""
    rows = []
    for operation, (width, height) in zip(operations, sizes, strict=True):
        kind = _KINDS[operation.name]
        matrix = affine(operation, width, height) if kind == _WARP else (1, 0, 0, 0, 1, 0)
        change = levels(operation) if kind == _LEVELS else Levels()
        factor = operation.value if operation.name in ENHANCEMENTS else 1.0
        rows.append((kind, np.reshape(matrix, (2, 3)), change.add, change.threshold, change.mask, factor))
    columns = zip(_INPUTS.items(), zip(*rows, strict=True), strict=True)
    return {f"{name}{number}": np.array(values, kind) for (name, (_, kind, _)), values in columns}


def apply_operation(x: Any, given: dict[str, Any]) -> Any:
    """Pictures [H,W,3] uint8 after the operation that `given`, of operation_inputs, names for each."""
    kind = given["kind"]
    if kind == _WARP:
        out = fn.warp_affine(x, matrix=given["matrix"], inverse_map=True, interp_type=types.INTERP_NN, fill_value=0)
    elif kind == _LEVELS:
        out = _map_levels(x, given["add"], given["threshold"], given["mask"])
    elif kind == _AUTO_CONTRAST:
        out = _auto_contrast(x)
    elif kind == _EQUALIZE:
        out = _equalize(x)
    elif kind == _COLOR:
        out = _blend(_gray(x), x, given["factor"])
    elif kind == _CONTRAST:
        mean = fn.reductions.mean(_gray(x), axes=[0, 1], keep_dims=True)
        out = _blend(math.floor(mean + 0.5), x, given["factor"])
    elif kind == _BRIGHTNESS:
        out = _blend(0.0, x, given["factor"])
    else:
        out = _blend(_smooth(x), x, given["factor"])
    return out


def _levels_of(x: Any) -> Any:
    """Values of any type, in 0..255 but for rounding, as uint8, rounded down."""
    return fn.cast(math.floor(math.clamp(x, 0.0, 255.0)), dtype=types.UINT8)


def _gray(x: Any) -> Any:
    gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.cast(gray, dtype=types.FLOAT)


def _blend(plain: Any, x: Any, factor: Any) -> Any:
    return _levels_of(plain + factor * (x - plain))


def _smooth(x: Any) -> Any:
    """float32 [H,W,3]; the outermost pixels stay as they are."""
    inside = fn.filter(x, _SMOOTH, mode="valid")
    rows = fn.cat(x[1:-1, 0:1], inside, x[1:-1, -1:], axis=1)
    return fn.cast(fn.cat(x[0:1], rows, x[-1:], axis=0), dtype=types.FLOAT)


def _map_levels(x: Any, add: Any, threshold: Any, mask: Any) -> Any:
    moved = math.clamp(fn.cast(x, dtype=types.INT32) + add, 0, 255)
    inverted = fn.cast(moved >= threshold, dtype=types.INT32)
    return fn.cast(moved + inverted * (255 - 2 * moved), dtype=types.UINT8) & mask


def _auto_contrast(x: Any) -> Any:
    low = fn.cast(fn.reductions.min(x, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    high = fn.cast(fn.reductions.max(x, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    flat = fn.cast(low == high, dtype=types.FLOAT)  # a channel of one level stays as it is
    low, high = low * (1.0 - flat), high * (1.0 - flat) + 255.0 * flat
    return _levels_of((x - low) * 255.0 / (high - low) + 0.0005)


def _equalize(x: Any) -> Any:
    """Pillow maps a level to (pixels below it) / s, where s is the whole number of (pixels below the highest level) /
    255. DALI, like OpenCV, counts the level's own pixels too and does not round s: it is given the picture inverted,
    where the pixels below a level are those not counted, and s is put right afterwards."""
    high = fn.reductions.max(x, axes=[0, 1], keep_dims=True)
    below = fn.reductions.sum(fn.cast(x < high, dtype=types.INT32), axes=[0, 1], keep_dims=True)
    below = fn.cast(below, dtype=types.FLOAT)
    pixels = math.floor(below / 255.0)
    flat = fn.cast(pixels == 0.0, dtype=types.FLOAT)  # a channel with too few pixels stays as it is
    scale = below / (255.0 * (pixels + flat))
    inverted = fn.cast(255 - fn.cast(x, dtype=types.INT32), dtype=types.UINT8)
    equal = 255 - fn.cast(fn.equalize(inverted), dtype=types.INT32)
    return _levels_of((equal * scale + 0.5) * (1.0 - flat) + x * flat)
