"""Both image back ends against the published transforms, against each other, and on the pictures data sets really hold.

Errors are in levels of 255, before normalising.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_pictures import array, encode, noise, png, published, smooth, unusable, usable
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import Resize

from meter_fast.data.image_check import BadImage, check_image
from meter_fast.data.images import (
    BatchDecodeError,
    ImageBackend,
    ImageTransform,
    denormalise,
    image_transform,
    normalise,
    open_backend,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "transforms"
PICTURES = json.loads((GOLDEN / "images.json").read_text())["images"]
KINDS = ("torchvision", "dali")
# Largest and mean error against the published transform, for pictures that each back end resizes by itself. All other
# kinds go through Pillow, as published, and are equal.
LARGEST = {"torchvision": 2, "dali": 2}
AVERAGE = {"torchvision": 0.02, "dali": 0.3}


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest) -> Iterator[ImageBackend]:
    opened = open_backend(request.param, image_transform("clip", 48), "cpu", torch.float32, max_batch=8)
    yield opened
    opened.close()


def levels(images: torch.Tensor, transform: ImageTransform) -> torch.Tensor:
    """Normalised pictures [..., 3, S, S] as levels of 255, not rounded."""
    mean, std = torch.tensor(transform.mean)[:, None, None], torch.tensor(transform.std)[:, None, None]
    return (images * std + mean) * 255


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "size"), [("clip", 48), ("clip", 64), ("imagenet", 48), ("vit", 48)])
def test_published_transforms(kind: str, name: str, size: int) -> None:
    transform = image_transform(name, size)
    opened = open_backend(kind, transform, "cpu", torch.float32, max_batch=8)
    images = opened.decode([np.fromfile(GOLDEN / entry["file"], np.uint8) for entry in PICTURES.values()])
    expected = load_file(GOLDEN / "outputs.safetensors")
    for image, picture in zip(images, PICTURES, strict=True):
        error = (levels(image, transform) - levels(expected[f"{picture}.{name}.{size}"], transform)).abs()
        by_pillow = picture in ("rgba", "palette", "cmyk", "one_bit")
        assert error.max() <= (0.001 if by_pillow else LARGEST[kind] + 0.001), picture
        assert error.mean() <= (0.001 if by_pillow else AVERAGE[kind]), picture
    opened.close()


@pytest.mark.parametrize("picture", usable())
def test_every_kind_of_picture_is_decoded_as_published(backend: ImageBackend, picture: str) -> None:
    data = usable()[picture]
    check_image(array(data))
    image = denormalise(backend.decode([array(data)]), backend.transform)[0].permute(1, 2, 0).numpy().astype(int)
    if picture == "16-bit gray PNG":  # Pillow alone would clip it to white
        rows = np.arange(0, 60000, 2000).reshape(5, 6) >> 8
        data = encode(np.repeat(rows[:, :, None], 3, axis=2).astype(np.uint8), "PNG")
    error = np.abs(image - published(data, backend.transform))
    assert error.max() <= LARGEST[backend.name]
    assert error.mean() <= AVERAGE[backend.name]


def test_rotation_in_exif_is_not_applied(backend: ImageBackend) -> None:
    pictures = usable()
    plain, rotated = backend.decode([array(pictures["JPEG"]), array(pictures["JPEG with EXIF rotation"])])
    assert torch.equal(plain, rotated)


def test_back_ends_agree_on_jpegs_of_many_sizes() -> None:
    transform = image_transform("clip", 56)
    rng = np.random.default_rng(1)
    sizes = [(56, 56), (640, 480), (480, 640), (57, 113), (200, 56), *rng.integers(80, 320, (27, 2)).tolist()]
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}]
    pictures = [array(encode(smooth(*size), **kinds[index % 4])) for index, size in enumerate(sizes)]
    opened = [open_backend(kind, transform, "cpu", torch.float32, max_batch=32) for kind in KINDS]
    first, second = (levels(one.decode(pictures), transform) for one in opened)
    error = (first - second).abs().amax(dim=(1, 2, 3))
    assert error.max() <= 3.001, dict(zip(map(str, sizes), error.tolist(), strict=True))
    assert (first - second).abs().mean() <= 0.3
    assert not opened[1].host_decoded  # DALI did them all by itself


@pytest.mark.parametrize("kind", KINDS)
def test_noise_the_hardest_picture_stays_close(kind: str) -> None:
    """Pillow rounds between its two passes and clips overshoot there, DALI does not: noise shows it most."""
    transform = image_transform("clip", 48)
    opened = open_backend(kind, transform, "cpu", torch.float32, max_batch=8)
    for size in ((200, 150), (101, 70), (31, 20)):
        data = encode(noise(*size), "PNG")
        image = levels(opened.decode([array(data)]), transform)[0].permute(1, 2, 0).numpy()
        error = np.abs(image - published(data, transform))
        assert error.max() <= {"torchvision": 2, "dali": 12}[kind] + 0.001
        assert error.mean() <= {"torchvision": 0.02, "dali": 0.5}[kind]


def test_window_follows_torchvision() -> None:
    rng = np.random.default_rng(0)
    for width, height in [(640, 480), (480, 640), (1, 1), (500, 333), *rng.integers(1, 700, (300, 2)).tolist()]:
        size = int(rng.integers(1, 400))
        if max(width, height) > 20 * min(width, height):
            continue
        window = image_transform("clip", size).window(width, height)
        resized = Resize(size)(Image.new("1", (width, height)))
        assert (window.width, window.height) == resized.size
    assert image_transform("clip", 224).window(640, 480).width == 298  # rounded it would be 299


def test_right_size_is_not_resized(backend: ImageBackend) -> None:
    pixels = noise(48, 48)
    image = backend.decode([array(encode(pixels, "PNG"))])
    assert torch.equal(denormalise(image, backend.transform)[0].permute(1, 2, 0), torch.from_numpy(pixels))


def test_normalise_is_the_published_formula() -> None:
    transform = image_transform("imagenet", 16)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = torch.tensor(transform.mean)[:, None, None], torch.tensor(transform.std)[:, None, None]
    expected = (pixels.double() / 255 - mean) / std
    assert torch.allclose(normalise(pixels, transform, torch.float32).double(), expected, atol=1e-6)
    half = normalise(pixels, transform, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, normalise(pixels, transform, torch.float32).bfloat16())
    assert torch.equal(denormalise(normalise(pixels, transform, torch.float32), transform), pixels)


def test_output_is_contiguous_in_the_dtype_asked_for() -> None:
    for kind in KINDS:
        opened = open_backend(kind, image_transform("clip", 32), "cpu", torch.bfloat16, threads=2, max_batch=4)
        images = opened.decode([array(encode(smooth(60, 50))), array(encode(smooth(50, 60, 4), "PNG"))])
        assert images.shape == (2, 3, 32, 32)
        assert images.dtype == torch.bfloat16
        assert images.is_contiguous()
        opened.close()


def test_batches_of_any_size_hold_the_same_pictures(backend: ImageBackend) -> None:
    data = [array(encode(smooth(60 + index, 50, 3 + (index == 2)), "PNG")) for index in range(7)]
    whole = backend.decode(data)
    parts = torch.cat([backend.decode(data[:1]), backend.decode(data[1:4]), backend.decode(data[4:])])
    assert torch.equal(whole, parts)


def test_earlier_batches_survive_later_ones(backend: ImageBackend) -> None:
    first = backend.decode([array(encode(smooth(60, 50)))])
    kept = first.clone()
    for seed in range(4):
        backend.decode([array(encode(noise(60, 50, seed=seed)))])
    assert torch.equal(first, kept)


def test_threads_may_share_a_back_end(backend: ImageBackend) -> None:
    data = [[array(encode(smooth(60, 50, seed=batch * 3 + index))) for index in range(3)] for batch in range(12)]
    alone = [backend.decode(batch) for batch in data]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(backend.decode, data))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_bad_picture_costs_its_batch_and_nothing_more(backend: ImageBackend) -> None:
    good, bad = array(encode(smooth(60, 50))), array(unusable()["JPEG without tables"][0])
    before = backend.decode([good, good])
    for _ in range(3):
        with pytest.raises(BatchDecodeError):
            backend.decode([good, bad])
        assert torch.equal(backend.decode([good, good]), before)
    assert backend.decode_one(good).shape == (3, 48, 48)
    with pytest.raises(BadImage) as caught:
        backend.decode_one(bad)
    assert caught.value.cause == "undecodable"


@pytest.mark.parametrize("picture", unusable())
def test_unusable_pictures_fail_with_their_cause(backend: ImageBackend, picture: str) -> None:
    data, cause = unusable()[picture]
    with pytest.raises(BatchDecodeError):
        backend.decode([array(encode(smooth(60, 50))), array(data)])
    with pytest.raises(BadImage) as caught:
        check_image(array(data))
        backend.decode_one(array(data))
    assert caught.value.cause == cause
    assert caught.value.detail


def test_damage_anywhere_gives_a_picture_or_a_cause() -> None:
    """Cut and overwritten files of every kind: a tensor or BadImage, and never the end of the process."""
    rng = np.random.default_rng(0)
    opened = open_backend("torchvision", image_transform("clip", 16), "cpu", torch.float32)
    seen = {"tensor": 0}
    for data in usable().values():
        for trial in range(24):
            damaged = bytearray(data)
            for _ in range(rng.integers(1, 5)):
                damaged[rng.integers(2, len(damaged))] = rng.integers(256)
            if trial % 4 == 0:
                del damaged[rng.integers(2, len(damaged)) :]
            try:
                check_image(bytes(damaged), max_pixels=2_000_000)
                image = opened.decode_one(array(bytes(damaged)))
            except BadImage as error:
                seen[error.cause] = seen.get(error.cause, 0) + 1
            else:
                assert image.shape == (3, 16, 16)
                seen["tensor"] += 1
    assert min(seen[key] for key in ("tensor", "truncated", "undecodable", "too many pixels")) > 0, seen


def test_dali_damage_fails_the_batch_alone() -> None:
    rng = np.random.default_rng(0)
    good = array(encode(smooth(60, 50)))
    opened = open_backend("dali", image_transform("clip", 16), "cpu", torch.float32, max_batch=4)
    expected, outcomes = opened.decode([good]), {"failed": 0, "decoded": 0}
    for picture in ("JPEG", "progressive JPEG", "PNG"):
        for _ in range(15):
            damaged = bytearray(usable()[picture])
            for _ in range(3):
                damaged[rng.integers(30, len(damaged))] = rng.integers(256)
            try:
                check_image(bytes(damaged), max_pixels=2_000_000)
                images = opened.decode([good, array(bytes(damaged))])
            except BadImage:
                continue
            except BatchDecodeError:
                outcomes["failed"] += 1
                images = opened.decode([good])
            else:
                outcomes["decoded"] += 1
            assert torch.equal(images[:1], expected)
    assert min(outcomes.values()) > 0


def test_what_dali_leaves_to_the_cpu_is_counted() -> None:
    opened = open_backend("dali", image_transform("clip", 32), "cpu", torch.float32, max_batch=8)
    names = ("JPEG", "RGBA PNG", "CMYK JPEG", "16-bit gray PNG", "extreme 20000 x 1 PNG", "gray PNG with alpha")
    opened.decode([array(usable()[name]) for name in names])
    assert opened.host_decoded == {
        "PNG with alpha": 2,
        "CMYK JPEG": 1,
        "16-bit gray PNG": 1,
        "PNG of extreme shape": 1,
    }


def test_extreme_shapes_match_resizing_all_of_them(backend: ImageBackend) -> None:
    for size in ((401, 37), (30, 333), (700, 9)):
        for channels in (3, 4):
            picture = smooth(*size, channels=channels)
            picture[:, :, 3:] = 128 + picture[:, :, 3:] // 2  # where hardly anything shows, rounding is magnified
            data = encode(picture, "PNG")
            image = denormalise(backend.decode([array(data)]), backend.transform)[0].permute(1, 2, 0).numpy()
            assert np.abs(image.astype(int) - published(data, backend.transform)).max() <= (1 if channels == 3 else 3)


def test_alpha_follows_the_transform() -> None:
    """Half of the picture is transparent green: premultiplied resizing keeps it out of the border."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :32] = (200, 0, 0, 255)
    rgba[:, 32:] = (0, 200, 0, 0)
    data = [array(encode(rgba, "PNG"))]
    border = {}
    for name in ("clip", "imagenet"):
        transform = image_transform(name, 30)
        opened = open_backend("torchvision", transform, "cpu", torch.float32)
        border[name] = denormalise(opened.decode(data), transform)[0, :, 15, 14].tolist()
    assert border["clip"][0] > 195
    assert border["clip"][1] < 5
    assert border["imagenet"][1] > 5


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'pixelbert'.*'clip', 'imagenet' or 'vit'"):
        image_transform("pixelbert", 32)
    with pytest.raises(ValueError, match="image size 0"):
        image_transform("clip", 0)
    with pytest.raises(ValueError, match=r"'pil'.*'auto', 'dali' or 'torchvision'"):
        open_backend("pil", image_transform("clip", 32), "cpu", torch.float32)


def test_auto_is_torchvision_on_a_cpu() -> None:
    opened = open_backend("auto", image_transform("clip", 32), "cpu", torch.float32)
    assert opened.name == "torchvision"
    assert opened.decode([]).shape == (0, 3, 32, 32)


def test_dali_refuses_more_than_it_was_opened_for() -> None:
    opened = open_backend("dali", image_transform("clip", 32), "cpu", torch.float32, max_batch=2)
    with pytest.raises(ValueError, match="3 pictures in one batch; the DALI back end was opened for 2"):
        opened.decode([array(encode(smooth(9, 9)))] * 3)
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.decode([array(encode(smooth(9, 9)))])


def test_the_cpu_back_end_needs_neither_dali_nor_cuda() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['nvidia.dali'] = None\n"
        "from meter_fast.data.images import image_transform, open_backend\n"
        "open_backend('auto', image_transform('clip', 8), 'cpu', torch.float32)\n"
        "assert not torch.cuda.is_initialized()\n"
        "try: open_backend('dali', image_transform('clip', 8), 'cpu', torch.float32)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "needs NVIDIA DALI" in done.stdout
    assert "data.backend=torchvision" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: DALI's mixed decoder")
def test_dali_on_a_gpu_agrees_with_the_cpu() -> None:
    transform = image_transform("clip", 224)
    pictures = [array(data) for data in usable().values()]
    pictures += [array(encode(smooth(*size))) for size in ((640, 480), (500, 375), (333, 500))]
    opened = open_backend("auto", transform, "cuda", torch.float32, max_batch=len(pictures))
    images = opened.decode(pictures)
    assert (opened.name, images.device.type) == ("dali", "cuda")
    host = open_backend("torchvision", transform, "cpu", torch.float32).decode(pictures)
    error = (levels(images.cpu(), transform) - levels(host, transform)).abs()
    assert error.amax(dim=(1, 2, 3)).max() <= 6
    assert error.mean() <= 0.5
    with pytest.raises(BatchDecodeError):
        opened.decode([pictures[0], array(unusable()["JPEG without tables"][0])])
    assert torch.equal(opened.decode(pictures), images)


def test_a_file_that_only_dali_refuses_is_still_read() -> None:
    """A wrong checksum after the last pixel: Pillow has all pixels by then, DALI fails the batch."""
    whole = png(8, 8, 8, 0, bytes(72))
    damaged = array(whole[:-16] + bytes(4) + whole[-12:])
    opened = open_backend("dali", image_transform("clip", 8), "cpu", torch.float32, max_batch=2)
    with pytest.raises(BatchDecodeError):
        opened.decode([damaged])
    assert torch.equal(opened.decode_one(damaged), opened.decode_one(array(whole)))
