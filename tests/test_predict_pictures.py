"""A picture comes out alike in whatever form it is given, and what is none is told apart by its cause."""

import io

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from PIL import Image

from meter_fast.data.images import image_transform
from meter_fast.data.images_torchvision import TorchvisionBackend
from meter_fast.predict.pictures import WrongImage, key_of, read_picture

CLIP, IMAGENET = image_transform("clip", 48), image_transform("imagenet", 48)
FILES = sorted(path for path in (GOLDEN / "transforms").iterdir() if path.suffix in (".png", ".tif"))


def pixels_of_file(path, transform) -> torch.Tensor:
    """What training reads."""
    return TorchvisionBackend(transform, "cpu", torch.float32).decode_one(np.frombuffer(path.read_bytes(), np.uint8))


@pytest.mark.parametrize("transform", [CLIP, IMAGENET], ids=lambda t: t.name)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_path_bytes_and_pil_picture_are_the_same(path, transform):
    expected = pixels_of_file(path, transform)
    assert expected.shape == (3, 48, 48)
    with Image.open(path) as opened:
        loaded = opened.copy()
    data = path.read_bytes()
    for image in (path, str(path), data, bytearray(data), memoryview(data), loaded, Image.open(path)):
        assert torch.equal(read_picture(image, transform).pixels, expected)


@pytest.mark.parametrize("name", ["gray", "rgb_wide", "rgba"])
def test_arrays_are_the_same(name):
    path = GOLDEN / "transforms" / f"{name}.png"
    array = np.asarray(Image.open(path))
    assert array.shape[2:] == {"gray": (), "rgb_wide": (3,), "rgba": (4,)}[name]
    for given in (array, np.asfortranarray(array), array[..., None] if array.ndim == 2 else array[:]):
        assert torch.equal(read_picture(given, CLIP).pixels, pixels_of_file(path, CLIP))
    flipped = array[:, ::-1]
    assert torch.equal(read_picture(flipped, CLIP).pixels, read_picture(np.ascontiguousarray(flipped), CLIP).pixels)


ONE_LEVEL = 0.016  # of 255, as a normalised value


def test_a_jpeg_opened_by_pillow_is_its_file():
    out = io.BytesIO()
    Image.open(GOLDEN / "transforms" / "rgb_wide.png").save(out, "JPEG", quality=90)
    expected = read_picture(out.getvalue(), CLIP).pixels
    assert torch.equal(read_picture(Image.open(out), CLIP).pixels, expected)


def test_sixteen_bits_a_pixel_are_their_high_byte():
    gray = Image.open(GOLDEN / "transforms" / "rgb_wide.png").convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    distance = read_picture(deep, CLIP).pixels - read_picture(gray, CLIP).pixels
    assert distance.abs().max() < ONE_LEVEL  # two resizers


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LA", "La", "1", "P", "RGBA", "RGBa", "RGBX"])
def test_modes_of_pillow(mode):
    """As Pillow itself converts them."""
    picture = Image.open(GOLDEN / "transforms" / "rgb_wide.png")
    odd = picture.convert(mode.upper()).convert(mode) if mode in ("La", "RGBa") else picture.convert(mode)
    assert odd.mode == mode
    whole = odd.convert(mode.upper()) if mode in ("La", "RGBa") else odd
    distance = read_picture(odd, CLIP).pixels - read_picture(whole.convert("RGB"), CLIP).pixels
    assert distance.abs().max() < ONE_LEVEL


@pytest.mark.parametrize(
    ("image", "cause", "message"),
    [
        ("nowhere.jpg", "no such file", "nowhere.jpg does not exist: check the path"),
        (".", "no such file", ". is a folder"),
        ("a\0b", "no such file", "cannot be read"),
        (b"", "zero bytes", "0 bytes"),
        (b"hello there, this is text", "not an image", "begins with"),
        ((GOLDEN / "transforms" / "rgb_wide.png").read_bytes()[:200], "truncated", "no IEND"),
        (Image.new("F", (8, 8)), "unsupported", "32 bits a pixel"),
        (np.zeros((0, 5, 3), np.uint8), "unsupported", "no picture"),
        (np.zeros((5, 5, 2), np.uint8), "unsupported", "no picture"),
        (torch.zeros(3, 8, 8), "not an image", "Tensor is no image: give a path"),
        (None, "not an image", "NoneType is no image"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isprintable() else type(x).__name__,
)
def test_what_is_no_picture(image, cause, message):
    with pytest.raises(WrongImage, match=message) as caught:
        read_picture(image, CLIP)
    assert caught.value.cause == cause


def test_a_damaged_file_behind_a_pil_picture(tmp_path):
    data = (GOLDEN / "transforms" / "rgb_wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(WrongImage, match=r"PIL picture \(RGB, .* cannot be read"):
        read_picture(Image.open(tmp_path / "cut.png"), CLIP)


def test_a_picture_read_before_is_taken_as_it_is_by_a_model_of_its_size():
    picture = read_picture(FILES[0], CLIP)
    assert read_picture(picture, CLIP) is picture
    with pytest.raises(WrongImage, match="was read for another model"):
        read_picture(picture, image_transform("clip", 64))


def test_what_counts_as_the_same_picture():
    array = np.zeros((4, 4, 3), np.uint8)
    assert key_of("a.png") == key_of("a.png") != key_of("b.png")
    assert key_of(b"abc") == key_of(b"abc") and key_of(array) == key_of(array) != key_of(array.copy())
