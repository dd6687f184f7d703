"""From encoded pictures to the model's input as published: Pillow, picture by picture.

Source: METER, `datasets/base_dataset.py`, and clip_transform and clip_transform_randaug of `transforms/transform.py`.
The other side of comparisons of the data path. The steps stand apart, so that each can be timed.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from meter_fast.data.images import CLIP_MEAN, CLIP_STD
from meter_fast.data.randaugment import Operation
from meter_fast.data.randaugment_pillow import augment_picture
from meter_fast.data.sources import Sources

# What is drawn besides a sample's own pictures (draw_false_image in METER's config.py, 0 in the tasks not named here).
FALSE_PICTURES = {"pretrain": 1, "retrieval_coco": 1}


def decode(encoded: np.ndarray) -> Image.Image:
    """The whole picture as RGBA."""
    return Image.open(io.BytesIO(encoded)).convert("RGBA")


def augment(picture: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    """RandAugment, in RGB."""
    return augment_picture(picture.convert("RGB"), operations).convert("RGBA") if operations else picture


def resize(picture: Image.Image, size: int) -> Image.Image:
    """RGB, size x size."""
    return Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])(picture).convert("RGB")


def normalise(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures of size x size -> [B,3,S,S] float32, put into one tensor as in the published collator."""
    transform = Compose([ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    images = torch.zeros(len(pictures), 3, size, size)
    for image, picture in zip(images, pictures, strict=True):
        image.copy_(transform(picture))
    return images


def prepare(
    encoded: Sequence[np.ndarray], size: int, operations: Sequence[Sequence[Operation]] | None = None
) -> Tensor:
    """All steps: B encoded pictures -> [B,3,S,S] float32."""
    drawn = operations or [()] * len(encoded)
    pictures = [resize(augment(decode(one), own), size) for one, own in zip(encoded, drawn, strict=True)]
    return normalise(pictures, size)


def read_pictures(sources: Sources, samples: Sequence[int], task: str, chance: np.random.Generator) -> Iterator:
    """The encoded pictures that the published loader decodes for samples, one after another: all of each, and the
    false ones that its task draws."""
    for sample in samples:
        yield from sources.read(sample).images
        for _ in range(FALSE_PICTURES.get(task, 0)):
            yield sources.read(int(chance.integers(len(sources)))).image
