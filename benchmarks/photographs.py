"""Pictures like photographs, drawn, as JPEGs: the same ones everywhere. Knows nothing of what is measured with them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from meter_fast.data.scenes.tables import write_table

QUALITY = 90
# Strength in levels of 255 and cells across the picture of each layer of noise: as in nature, the finer the weaker.
LAYERS = ((60, 7), (40, 20), (25, 60), (12, 160), (8, 400))
SHAPES = 12
GRAIN = 2  # levels of 255


def photograph(number: int, width: int, height: int) -> Image.Image:
    """Smooth noise of several sizes, shapes with sharp edges, grain: RGB, another picture for each number."""
    chance = np.random.default_rng([number, width, height])
    pixels = np.full((height, width, 3), 128, np.float32)
    for strength, cells in LAYERS:
        for channel in range(3):
            coarse = chance.standard_normal((max(2, cells * height // width), cells), dtype=np.float32)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(smooth)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for shape in range(SHAPES):
        left, top = chance.integers(0, (width, height))
        across, down = chance.integers(width // 20, width // 4, 2)
        colour = tuple(chance.integers(0, 256, 3).tolist())
        box = (int(left), int(top), int(left + across), int(top + down))
        (pen.ellipse if shape % 2 else pen.rectangle)(box, fill=colour)
    grain = chance.standard_normal((height, width, 1), dtype=np.float32) * GRAIN
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def jpeg(picture: Image.Image) -> np.ndarray:
    """Encoded at QUALITY, colour at half the resolution as cameras do: uint8 [n]."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=QUALITY)
    return np.frombuffer(out.getvalue(), np.uint8)


def photographs(count: int, width: int, height: int) -> list[np.ndarray]:
    """The first `count` photographs as JPEGs."""
    return [jpeg(photograph(number, width, height)) for number in range(count)]


def shrunk(encoded: Sequence[np.ndarray], side: int) -> list[np.ndarray]:
    """The same pictures with `side` pixels along the short side, as shards of resized pictures hold them."""
    small = []
    for data in encoded:
        with Image.open(io.BytesIO(data)) as picture:
            scale = side / min(picture.size)
            size = [max(side, int(scale * length)) for length in picture.size]
            small.append(jpeg(picture.resize(size, Image.Resampling.BICUBIC)))
    return small


def write_captions(folder: Path, encoded: Sequence[np.ndarray], repeat: int) -> None:
    """A table coco_caption_karpathy_train.arrow of these pictures, each in `repeat` rows, with captions."""
    rows = (
        {
            "image": encoded[number % len(encoded)].tobytes(),
            "caption": [f"a photograph of some shapes , number {number}"],
            "image_id": f"{number}.jpg",
            "split": "train",
        }
        for number in range(repeat * len(encoded))
    )
    write_table(folder / "coco_caption_karpathy_train.arrow", rows)
