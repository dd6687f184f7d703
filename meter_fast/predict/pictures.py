"""A picture in any form that people have it in -> the model's pixels. Knows files, Pillow and numpy; no model.

All forms go through the decoder and the checks of training data: a picture and the file that holds it come out alike.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage, check_image
from meter_fast.data.images import ImageTransform
from meter_fast.data.images_torchvision import TorchvisionBackend

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_MODES = ("CMYK", "I", "F")
OF_ALPHA = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
CHANNELS = (1, 3, 4)
FORMS = "a path, the bytes of a file, a PIL picture or a uint8 array [H,W,3]"


class WrongImage(ValueError):
    """A picture that cannot be used. cause: for counting, one of `image_check.CAUSES` or "no such file"."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture read for one predictor: pixels float32 [3,S,S], normalised. Give it in place of the picture itself."""

    pixels: Tensor


ImageLike = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Picture


def read_picture(image: ImageLike, transform: ImageTransform) -> Picture:
    """Pixels of one picture. Arrays: uint8 [H,W] or [H,W,1] gray, [H,W,3] RGB, [H,W,4] RGBA.

    Raises WrongImage: what it is, what is wrong with it and what to do.
    """
    if isinstance(image, Picture):
        if image.pixels.shape != (3, transform.size, transform.size):
            raise WrongImage("unsupported", f"this Picture was read for another model: its pixels are "
                             f"{tuple(image.pixels.shape)}, this one's are of {transform.size} px")  # fmt: skip
        return image
    name = name_of(image)
    try:
        encoded = np.frombuffer(_encoded(image, name), np.uint8)
        check_image(encoded, DEFAULT_MAX_PIXELS)
        return Picture(TorchvisionBackend(transform, "cpu", torch.float32).decode_one(encoded))
    except BadImage as error:
        raise WrongImage(error.cause, f"{name} is no picture that can be read ({error})") from error


def key_of(image: ImageLike) -> object:
    """Equal for what is the same picture: the same path, the same bytes, the same object."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return image if isinstance(image, bytes) else ("object", id(image))


def name_of(image: object) -> str:
    """What to call a picture in a message."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    if isinstance(image, np.ndarray):
        return f"an array {image.dtype} {list(image.shape)}"
    if isinstance(image, Image.Image):
        return f"a PIL picture ({image.mode}, {image.width} x {image.height})"
    return f"an image of {len(image)} bytes" if isinstance(image, (bytes, bytearray, memoryview)) else repr(image)


def _encoded(image: ImageLike, name: str) -> bytes | memoryview:
    """The bytes of a file that holds the picture."""
    if isinstance(image, (str, os.PathLike)):
        return _read_file(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return image
    if isinstance(image, np.ndarray):
        return _save(_from_array(image, name), name)
    if isinstance(image, Image.Image):
        return _save(image, name)
    raise WrongImage("not an image", f"{type(image).__name__} is no image: give {FORMS}")


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise WrongImage("no such file", f"{path} is a folder: give the pictures in it, one by one")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WrongImage("no such file", f"{path} does not exist: check the path of the picture") from None
    except (OSError, ValueError) as error:  # no permission; a zero byte in the name
        raise WrongImage("no such file", f"{path} cannot be read ({error})") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS)
    if fits and array.size and array.dtype == np.uint8:
        flat = array[:, :, 0] if shape[2:] == (1,) else array
        return Image.fromarray(np.ascontiguousarray(flat))
    if len(shape) == 4:
        remedy = "for several pictures give a list of arrays"
    elif len(shape) == 3 and not fits and shape[0] in CHANNELS:
        remedy = "channels come last: array.transpose(1, 2, 0)"
    else:
        remedy = "give uint8 values 0 to 255 of shape [H,W], [H,W,3] or [H,W,4]"
    raise WrongImage("unsupported", f"{name} is no picture: {remedy}")


def _save(picture: Image.Image, name: str) -> bytes:
    out = io.BytesIO()
    try:
        if picture.mode not in PNG_MODES + TIFF_MODES:
            picture = picture.convert(OF_ALPHA.get(picture.mode, "RGB"))
        if picture.mode in TIFF_MODES:
            picture.save(out, "TIFF")
        else:
            picture.save(out, "PNG", compress_level=0)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow opens lazily: the file behind it may be damaged
        raise WrongImage("undecodable", f"{name} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return out.getvalue()
