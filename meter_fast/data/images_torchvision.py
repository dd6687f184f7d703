"""The CPU back end, and the oracle of the GPU one: torchvision decodes JPEG and resizes, Pillow does the other formats.

Knows decoders and resizing; what to resize to and how to normalise it is told by images.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from meter_fast.data.image_check import BadImage, ImageHeader, bad_image_of, open_with_pillow, read_header
from meter_fast.data.images import BatchDecodeError, ImageTransform, normalise
from meter_fast.data.randaugment import Operation
from meter_fast.data.randaugment_pillow import augment_picture

# Beyond this ratio of long side to crop the resized picture would be mostly thrown away (20000 x 1 at 288 px: 1.7 G
# pixels). Pillow resizes only the box that is kept, on a photograph within one level of 255 of resizing it all.
EXTREME_RATIO = 4


class TorchvisionBackend:
    """Decode, resize and crop on the CPU; bring the batch to `device` and normalise it there. Follows ImageBackend."""

    name = "torchvision"

    def __init__(
        self, transform: ImageTransform, device: torch.device | str, dtype: torch.dtype, threads: int = 1
    ) -> None:
        self.transform = transform
        self.device = torch.device(device)
        self.dtype = dtype
        self.host_decoded: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(
        self, encoded: Sequence[np.ndarray], operations: Sequence[Sequence[Operation]] | None = None
    ) -> torch.Tensor:
        """B encoded pictures (uint8 arrays) -> [B,3,S,S] in dtype on device. Raises BatchDecodeError."""
        here = self.device.type == "cpu"  # then each picture is normalised while it is in the cache, else all at once
        shape = (len(encoded), 3, self.transform.size, self.transform.size)
        images = torch.empty(shape, dtype=self.dtype if here else torch.uint8)

        def fill(index: int) -> None:
            try:
                picture = decode_picture(encoded[index], self.transform, operations[index] if operations else ())
            except BadImage as error:
                raise BatchDecodeError(f"picture {index} of the batch: {error}") from error
            if here:
                normalise(picture, self.transform, self.dtype, images[index])
            else:
                images[index] = picture

        for _ in (self._pool.map if self._pool else map)(fill, range(len(encoded))):
            pass
        return images if here else normalise(images.to(self.device), self.transform, self.dtype)

    def decode_one(self, encoded: np.ndarray, operations: Sequence[Operation] = ()) -> torch.Tensor:
        """One encoded picture -> [3,S,S] in dtype on device. Raises BadImage with its cause."""
        picture = decode_picture(encoded, self.transform, operations)[None].to(self.device)
        return normalise(picture, self.transform, self.dtype)[0]

    def close(self) -> None:
        """End the decoding threads."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


def decode_picture(
    encoded: np.ndarray, transform: ImageTransform, operations: Sequence[Operation] = ()
) -> torch.Tensor:
    """One encoded picture -> uint8 [3,S,S], resized and cropped, not normalised. Raises BadImage with its cause.

    operations: come first, on the whole picture in RGB.
    """
    header = read_header(encoded)
    if not header.plain or is_extreme(header):
        return by_pillow(encoded, header, transform, operations)
    return resize_and_crop(augment(decode_plain(encoded, header), operations), transform)


def augment(picture: torch.Tensor, operations: Sequence[Operation]) -> torch.Tensor:
    """uint8 [3,H,W] after `operations`, one by one, by Pillow."""
    if not operations:
        return picture
    return _to_tensor(augment_picture(Image.fromarray(picture.permute(1, 2, 0).numpy()), operations))


def resize_and_crop(picture: torch.Tensor, transform: ImageTransform) -> torch.Tensor:
    """uint8 [3,H,W] -> uint8 [3,S,S]."""
    height, width = picture.shape[1:]
    window, size = transform.window(width, height), transform.size
    if (window.height, window.width) != (height, width):
        picture = v2.resize_image(picture, [window.height, window.width], InterpolationMode.BICUBIC, antialias=True)
    return picture[:, window.top : window.top + size, window.left : window.left + size]


def is_extreme(header: ImageHeader) -> bool:
    """True for a picture so long and thin that resizing all of it would waste time and memory."""
    return max(header.width, header.height) > EXTREME_RATIO * min(header.width, header.height)


def decode_plain(encoded: np.ndarray, header: ImageHeader) -> torch.Tensor:
    """A plain JPEG or PNG -> uint8 [3,H,W], Pillow's pixels. EXIF orientation is not applied, as published.

    torchvision's PNG decoder is not used: a damaged checksum ends the process with a segmentation fault (0.29).
    """
    if header.format == "PNG":
        with open_with_pillow(memoryview(encoded).cast("B"), "PNG") as opened:
            return _to_tensor(_load(opened, "RGB"))
    data = np.asarray(encoded, dtype=np.uint8)
    if not data.flags.writeable:  # torch warns of a read-only mapped file; a copy costs little beside the decoding
        data = data.copy()
    try:
        return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise bad_image_of(error) from error


def by_pillow(
    encoded: np.ndarray, header: ImageHeader, transform: ImageTransform, operations: Sequence[Operation]
) -> torch.Tensor:
    """Any picture Pillow reads -> uint8 [3,S,S], step by step as published; of an animation, its first frame."""
    size = transform.size
    mode = "RGBA" if transform.alpha == "premultiplied" and not operations else "RGB"
    with open_with_pillow(memoryview(encoded).cast("B"), header.format) as opened:
        picture = augment_picture(_load(opened, mode), operations)
    window = transform.window(*picture.size)
    if is_extreme(header):
        across, down = picture.width / window.width, picture.height / window.height
        left, top = window.left * across, window.top * down
        box = (left, top, min(left + size * across, picture.width), min(top + size * down, picture.height))
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        picture = picture.resize((window.width, window.height), Image.Resampling.BICUBIC)
        picture = picture.crop((window.left, window.top, window.left + size, window.top + size))
    return _to_tensor(picture.convert("RGB"))


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _load(opened: Image.Image, mode: str) -> Image.Image:
    """Decode and convert to RGB or RGBA. 16-bit gray keeps its high byte: Pillow's own conversion clips it to white."""
    try:
        opened.load()
        if opened.mode == mode:
            return opened
        if opened.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert(mode)
        if opened.mode in ("I", "F"):
            raise BadImage("unsupported", "32 bits a pixel; convert it to 8 bits")
        return opened.convert("RGBA").convert(mode) if opened.mode == "P" else opened.convert(mode)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # as in open_with_pillow
        raise bad_image_of(error) from error
