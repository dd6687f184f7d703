"""The one definition of each image transform, and the interface of the back ends that carry it out.

Knows sizes, crops and normalisation; knows no decoder. A back end turns encoded pictures into uint8 pictures of the
right size, and `normalise` here makes the model's input of them, so rounding to 8 bits comes at the same place in all
back ends as published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from meter_fast.data.randaugment import Operation

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BatchDecodeError(RuntimeError):
    """A back end could not decode a batch and cannot say which picture is at fault: decode_one of each finds it."""


@dataclass(frozen=True)
class Window:
    """Size of the resized picture, and the place of the S x S crop in it, in pixels."""

    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class ImageTransform:
    """Resize the short side to `size` (bicubic, antialiased, as Pillow), crop the centre size x size, normalise.

    mean, std: per channel, of values in 0..1. alpha: "premultiplied" resizes a transparent picture as RGBA, weighted by
    alpha, and then drops alpha (METER's CLIP transform); "dropped" drops it first (METER's others). Opaque
    pictures come out the same.
    """

    name: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    alpha: str

    def window(self, width: int, height: int) -> Window:
        """Sizes for a picture of width x height, rounded as torchvision does: long side down, crop's place to even."""
        if width <= height:
            wide, tall = self.size, int(self.size * height / width)
        else:
            wide, tall = int(self.size * width / height), self.size
        return Window(wide, tall, round((wide - self.size) / 2), round((tall - self.size) / 2))


def image_transform(name: str, size: int) -> ImageTransform:
    """A transform of METER's code (clip_transform, imagenet_transform, vit_transform).

    name: "clip", "imagenet" or "vit"; size in pixels.

    Raises ValueError for an unknown name or a size below 1.
    """
    if size < 1:
        raise ValueError(f"image size {size}: give a positive number of pixels")
    if name == "clip":
        return ImageTransform(name, size, CLIP_MEAN, CLIP_STD, "premultiplied")
    if name == "imagenet":
        return ImageTransform(name, size, IMAGENET_MEAN, IMAGENET_STD, "dropped")
    if name == "vit":
        return ImageTransform(name, size, HALF, HALF, "dropped")
    raise ValueError(f"unknown image transform {name!r}: choose 'clip', 'imagenet' or 'vit'")


def normalise(
    pictures: torch.Tensor, transform: ImageTransform, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 [...,3,S,S] -> contiguous, in dtype on the same device: (x / 255 - mean) / std, computed in fp32.

    out: a tensor of that shape and dtype to write to; it is then what is returned.
    """
    scale, shift = _scale_and_shift(transform, pictures.device)
    if out is None:
        out = torch.empty(pictures.shape, dtype=dtype, device=pictures.device)
    values = out if dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    values.copy_(pictures).mul_(scale).sub_(shift)  # torch.mul of both types would make a copy first
    return out if values is out else out.copy_(values)


@lru_cache(16)
def _scale_and_shift(transform: ImageTransform, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [3,1,1] each. Kept: making them anew would be a fifth of what normalising a picture takes."""
    mean = torch.tensor(transform.mean, device=device)[:, None, None]
    std = torch.tensor(transform.std, device=device)[:, None, None]
    return 1 / (255 * std), mean / std


def denormalise(images: torch.Tensor, transform: ImageTransform) -> torch.Tensor:
    """The inverse of `normalise`, for showing pictures: [..., 3, S, S] -> uint8 of the same shape."""
    mean = torch.tensor(transform.mean, device=images.device)[:, None, None]
    std = torch.tensor(transform.std, device=images.device)[:, None, None]
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pixel_values(images: torch.Tensor, transform: ImageTransform) -> torch.Tensor:
    """The inverse of `normalise`, unrounded: [..., 3, S, S] -> float32 of the same shape, values in 0..1."""
    mean = torch.tensor(transform.mean, device=images.device)[:, None, None]
    std = torch.tensor(transform.std, device=images.device)[:, None, None]
    return (images.float() * std + mean).clamp(0, 1)


class ImageBackend(Protocol):
    """Encoded pictures in, the model's input out. Safe to call from several threads.

    operations: for each picture, what is done to it before it is resized; None leaves all as they are.
    host_decoded counts, by kind of picture, what a GPU back end left to the CPU one (empty for the CPU one).
    """

    name: str
    transform: ImageTransform
    device: torch.device
    host_decoded: Counter[str]

    def decode(
        self, encoded: Sequence[np.ndarray], operations: Sequence[Sequence[Operation]] | None = None
    ) -> torch.Tensor:
        """B encoded pictures (uint8 arrays) -> [B,3,S,S]. Raises BatchDecodeError when one cannot be decoded."""
        ...

    def decode_one(self, encoded: np.ndarray, operations: Sequence[Operation] = ()) -> torch.Tensor:
        """One encoded picture -> [3,S,S] by the CPU back end. Raises BadImage with its cause."""
        ...

    def close(self) -> None:
        """Free threads and device memory."""
        ...


def open_backend(
    kind: str,
    transform: ImageTransform,
    device: torch.device | str,
    dtype: torch.dtype,
    threads: int = 1,
    max_batch: int = 64,
) -> ImageBackend:
    """Open a back end. kind: "auto" (DALI on a CUDA device, torchvision on the CPU), "dali" or "torchvision".

    threads: decoding threads. max_batch: most pictures in one decode() call (DALI allocates for it; torchvision does
    not care). Raises ValueError for an unknown kind, or when DALI is asked for and is not installed.
    """
    device = torch.device(device)
    if kind not in ("auto", "dali", "torchvision"):
        raise ValueError(f"data.backend={kind!r}: choose 'auto', 'dali' or 'torchvision'")
    if kind == "dali" or (kind == "auto" and device.type == "cuda"):
        try:
            from meter_fast.data.images_dali import DaliBackend
        except ImportError as error:
            raise ValueError(
                f"data.backend={kind!r} on {device} needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130, or "
                "-cuda120 for an older driver; data.backend=torchvision does without"
            ) from error
        return DaliBackend(transform, device, dtype, threads=threads, max_batch=max_batch)
    from meter_fast.data.images_torchvision import TorchvisionBackend

    return TorchvisionBackend(transform, device, dtype, threads=threads)
