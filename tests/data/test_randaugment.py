"""RandAugment: every operation against the published one in both back ends, and who is augmented how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from making import SIDE, backend, global_batches, loader_of
from odd_pictures import array, encode, noise, smooth, usable
from PIL import Image
from safetensors.numpy import load_file

from meter_fast.data.assemble import Assembler
from meter_fast.data.images import ImageBackend, denormalise, image_transform, open_backend
from meter_fast.data.images_torchvision import decode_picture
from meter_fast.data.randaugment import DRAWN, GEOMETRIC, VALUES, Operation, RandAugment
from meter_fast.data.randaugment_pillow import augment_picture

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "randaug" / "ops.safetensors")
UNCHANGED = Operation("Posterize", 8)  # keeps all bits
EVERY = [Operation(name, value) for name, values in VALUES["randaugment_published"].items() for value in values]
CORRECTED = [Operation(name, value) for name, values in VALUES["randaugment"].items() for value in values]


def golden_name(operation: Operation) -> str:
    name = operation.name + ("abs" if operation.name.startswith("Translate") else "")
    return f"{name}.{'minus' if operation.value < 0 else 'plus'}"


def by_pillow(pixels: np.ndarray, operations: list[Operation]) -> np.ndarray:
    return np.asarray(augment_picture(Image.fromarray(pixels), operations)).astype(int)


@pytest.fixture(scope="module")
def dali() -> Iterator[ImageBackend]:
    opened = open_backend("dali", image_transform("clip", 70), "cpu", torch.float32, max_batch=32)
    yield opened
    opened.close()


def full_size(dali: ImageBackend, pixels: np.ndarray, operations: list[tuple[Operation, ...]]) -> np.ndarray:
    """[n,S,S,3] of a square picture of the back end's own size, which is not resized."""
    images = dali.decode([array(encode(pixels, "PNG"))] * len(operations), operations)
    return denormalise(images, dali.transform).permute(0, 2, 3, 1).cpu().numpy().astype(int)


@pytest.mark.parametrize("operation", EVERY, ids=golden_name)
def test_published_operations_by_pillow(operation: Operation) -> None:
    assert np.array_equal(by_pillow(GOLDEN["input"], [operation]), GOLDEN[golden_name(operation)])


def test_every_published_operation_is_there() -> None:
    assert {golden_name(operation) for operation in EVERY} == set(GOLDEN) - {"input"}
    assert len(VALUES["randaugment_published"]) == 14


def close(operation: Operation, error: np.ndarray) -> None:
    if operation.name in GEOMETRIC:
        assert (error > 0).any(axis=-1).mean() <= 0.01, operation
    elif operation.name in ("Posterize", "Solarize", "SolarizeAdd"):
        assert error.max() == 0, operation
    else:
        assert error.max() <= 1, operation


@pytest.mark.parametrize("operation", EVERY, ids=golden_name)
def test_published_operations_by_dali(dali: ImageBackend, operation: Operation) -> None:
    """The middle 70 x 70 of the golden picture is what the crop keeps: nothing is resized."""
    encoded = array(encode(GOLDEN["input"], "PNG"))
    images = dali.decode([encoded, encoded], [(operation, UNCHANGED), (UNCHANGED, operation)])
    assert torch.equal(images[0], images[1])
    image = denormalise(images, dali.transform)[0].permute(1, 2, 0).numpy().astype(int)
    left = dali.transform.window(101, 70).left
    close(operation, np.abs(image - GOLDEN[golden_name(operation)][:, left : left + 70]))
    assert not dali.host_decoded


@pytest.mark.parametrize("pixels", ["smooth", "noise", "flat", "two levels", "narrow", "large"])
def test_dali_agrees_with_pillow(dali: ImageBackend, pixels: str) -> None:
    side = 700 if pixels == "large" else 70
    drawn = {
        "smooth": smooth(side, side),
        "noise": noise(side, side),
        "flat": np.full((side, side, 3), (7, 128, 255), np.uint8),
        "two levels": np.where(noise(side, side) < 250, 30, 31).astype(np.uint8),
        "narrow": 100 + smooth(side, side) // 16,
        "large": smooth(side, side),
    }[pixels]
    opened = dali
    if pixels == "large":
        opened = open_backend("dali", image_transform("clip", side), "cpu", torch.float32, max_batch=32)
    every = list(dict.fromkeys(EVERY + CORRECTED))
    images = full_size(opened, drawn, [(operation, UNCHANGED) for operation in every])
    for operation, image in zip(every, images, strict=True):
        close(operation, np.abs(image - by_pillow(drawn, [operation])))


def test_back_ends_agree_on_augmented_pictures_of_many_sizes() -> None:
    """After resizing the few pixels that differ are averaged away; two operations may add up their rounding."""
    transform = image_transform("clip", 56)
    sizes = [(56, 56), (640, 480), (300, 460), (57, 113), (200, 56)] * 12
    pictures = [array(encode(smooth(*size, seed=number))) for number, size in enumerate(sizes)]
    draw = RandAugment("randaugment", 0, 1)
    operations = [draw.operations(number, 0) for number in range(len(pictures))]
    opened = [open_backend(kind, transform, "cpu", torch.float32, max_batch=64) for kind in ("torchvision", "dali")]
    images = [denormalise(one.decode(pictures, operations), transform).float() for one in opened]
    error = (images[0] - images[1]).abs()
    assert error.mean() <= 0.6
    assert (error > 8).float().mean() <= 0.01  # at levels that Solarize inverts, a level of rounding is many
    assert not opened[1].host_decoded
    assert torch.equal(images[1][:4], denormalise(opened[1].decode(pictures[:4], operations[:4]), transform).float())
    plain = [denormalise(one.decode(pictures), transform).float() for one in opened]
    assert (plain[0] - plain[1]).abs().max() <= 4  # evaluation between training batches is not augmented
    assert (plain[1] - images[1]).abs().mean() > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: DALI's operators on one")
def test_dali_on_a_gpu_agrees_with_pillow() -> None:
    pixels = smooth(200, 200)
    opened = open_backend("dali", image_transform("clip", 200), "cuda", torch.float32, max_batch=32)
    every = list(dict.fromkeys(EVERY + CORRECTED))
    images = full_size(opened, pixels, [(operation, UNCHANGED) for operation in every])
    for operation, image in zip(every, images, strict=True):
        close(operation, np.abs(image - by_pillow(pixels, [operation])))


def test_what_dali_leaves_to_the_cpu_is_augmented_there_and_counted() -> None:
    transform = image_transform("clip", 32)
    opened = open_backend("dali", transform, "cpu", torch.float32, max_batch=8)
    flat = encode(smooth(6, 2), "PNG")
    data = [array(usable()["JPEG"]), array(usable()["RGBA PNG"]), array(flat)]
    operations = [(Operation("Brightness", 0.64), UNCHANGED)] * 3
    images = denormalise(opened.decode(data, operations), transform)
    assert opened.host_decoded == {"PNG with alpha": 1, "PNG below 3 pixels": 1}
    for image, one in zip(images[1:], data[1:], strict=True):
        assert torch.equal(image, decode_picture(one, transform, operations[0]))


def test_alpha_is_dropped_first_as_published() -> None:
    transform = image_transform("clip", 30)
    rgba = smooth(60, 40, 4)
    augmented = decode_picture(array(encode(rgba, "PNG")), transform, [Operation("Brightness", 0.64)])
    expected = decode_picture(array(encode(rgba[:, :, :3].copy(), "PNG")), transform, [Operation("Brightness", 0.64)])
    assert (augmented.int() - expected.int()).abs().max() <= 2  # Pillow and torchvision resize them


def test_corrected_values() -> None:
    published, corrected = VALUES["randaugment_published"], VALUES["randaugment"]
    changed = {name for name in published if published[name] != corrected[name]}
    assert changed == {"Posterize", "Color", "Contrast", "Brightness", "Sharpness"}
    pixels = smooth(40, 30)
    assert len(np.unique(by_pillow(pixels, [Operation("Posterize", published["Posterize"][0])]))) == 2
    assert len(np.unique(by_pillow(pixels, [Operation("Posterize", corrected["Posterize"][0])]))) > 100
    darker, brighter = (by_pillow(pixels, [Operation("Brightness", v)]).mean() for v in corrected["Brightness"])
    assert darker < pixels.mean() < brighter


def test_operations_are_drawn_evenly_and_anew_in_each_step() -> None:
    draw = RandAugment("randaugment", 5, 4)
    drawn = [draw.operations(4 * step, 7) for step in range(7000)]
    assert all(len(operations) == DRAWN for operations in drawn)
    counts = Counter(operation.name for operations in drawn for operation in operations)
    assert all(850 < counts[name] < 1150 for name in VALUES["randaugment"])
    values = Counter(operation.value for operations in drawn for operation in operations if operation.name == "Rotate")
    assert set(values) == {9.0, -9.0}
    assert 0.4 < values[9.0] / values.total() < 0.6
    pairs = {tuple(operation.name for operation in operations) for operations in drawn}
    assert len(pairs) == 14 * 14
    assert draw.operations(8, 7) == draw.operations(11, 7)  # one step
    assert any(draw.operations(8, picture) != draw.operations(8, 7) for picture in range(20))
    other = RandAugment("randaugment", 6, 4)
    assert any(other.operations(4 * step, 7) != drawn[step] for step in range(20))
    with pytest.raises(ValueError, match=r"data\.augment='autoaugment'"):
        RandAugment("autoaugment", 0, 4)


# ------------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("negatives", ["batch", "dataset"])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 2), (1, 2)])
def test_every_division_augments_alike(damaged, tokenizer, negatives: str, world: int, micro: int) -> None:
    """With bad pictures among them: a replacement and a false picture are augmented alike, too."""
    options = {"global_batch": 16, "negatives": negatives, "augment": RandAugment("randaugment", 3, 16)}
    whole, _ = global_batches(damaged, tokenizer, (0, 4), **options)
    parts, _ = global_batches(damaged, tokenizer, (0, 4), world=world, **options | {"micro_batch": micro})
    assert parts == whole
    plain, _ = global_batches(damaged, tokenizer, (0, 4), **options | {"augment": None})
    assert [[row[:6] for row in step] for step in whole] == [[row[:6] for row in step] for step in plain]
    assert (
        sum(a[6] != b[6] for one, other in zip(whole, plain, strict=True) for a, b in zip(one, other, strict=True)) > 50
    )


def test_pictures_of_a_batch_are_the_drawn_operations(sound, tokenizer) -> None:
    draw = RandAugment("randaugment_published", 3, 12)
    loader = loader_of(sound, tokenizer, global_batch=12, augment=draw)
    transform = backend().transform
    for step, batches in enumerate(loader.steps(0, 3)):
        for batch in batches:
            for image, index in zip(denormalise(batch.images, transform), batch.sample_ids.tolist(), strict=True):
                operations = draw.operations(12 * step, int(sound.image_ids(np.array([index]))[0]))
                assert torch.equal(image, decode_picture(sound.read(index).image, transform, operations))


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_a_batch_that_fails_is_augmented_one_by_one(damaged, tokenizer, kind: str) -> None:
    """The undecodable picture is replaced; the others of its batch are augmented as they would have been."""
    opened = open_backend(kind, image_transform("clip", SIDE), "cpu", torch.float32, max_batch=64)
    text = loader_of(damaged, tokenizer, global_batch=16)._assembler.text
    draw = RandAugment("randaugment_published", 3, 64)
    batch = Assembler(damaged, text, opened, 3, augment=draw).micro_batch(np.arange(30, 46), np.arange(16)).batch
    host = open_backend("torchvision", image_transform("clip", SIDE), "cpu", torch.float32)
    for image, index in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        operations = draw.operations(0, int(damaged.image_ids(np.array([index]))[0]))
        expected = host.decode_one(damaged.read(index).image, operations)
        close = (denormalise(image, host.transform).int() - denormalise(expected, host.transform).int()).abs()
        assert close.max() <= 2 or "Solarize" in {operation.name for operation in operations}
