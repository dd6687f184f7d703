"""Both sides of `benchmarks.data_pipeline` prepare the same pictures, its plain side is the published one, and what it
counts is what the real loaders decode."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import data_loading, published_pictures
from benchmarks.data_pipeline import (
    Form,
    Stored,
    advise,
    check,
    make_forms,
    measure,
    milliseconds,
    ratio,
)
from benchmarks.latency import Spent
from benchmarks.photographs import photographs, shrunk, write_captions
from meter_fast.data.image_check import read_header
from meter_fast.data.images import image_transform
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.scenes import write_scenes
from meter_fast.data.sources import open_sources

GOLDEN = Path(__file__).parents[1] / "golden" / "transforms"
SIZE = 48
TRANSFORM = image_transform("clip", SIZE)
DECODES = {  # per sample: published, ours at most, ours of held-out texts at most
    "pretrain": (2, 1, 1),
    "pretrain, negatives of the data set": (2, 1.5, 1),
    "retrieval_coco": (2, 1, None),
    "vqa": (1, 1, 0.6),
    "nlvr2": (2, 2, 1),
    "snli_ve": (1, 1, 0.8),
}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return photographs(3, 96, 72)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=80, val=20, test=20, pixels=32)
    return root


def forms(pictures: list[np.ndarray], augmentation: str) -> dict[str, Form]:
    drawn = None
    if augmentation != "none":
        chance = RandAugment(augmentation, 0, 1)
        drawn = [chance.operations(number, number) for number in range(len(pictures))]
    return {name: make() for name, make in make_forms(pictures, SIZE, drawn).items()}


def test_each_form_and_step_is_measured(pictures: list[np.ndarray]) -> None:
    found = measure(pictures, SIZE, None, 2)
    steps = {name: set(some) - {"whole", "unaugmented"} for name, some in found.items()}
    all_of_them = {"decode", "resize", "augment", "normalise"}
    assert steps == {
        "published": all_of_them,
        "pillow": set(),
        "torchvision": all_of_them,
        "dali": {"decode", "normalise"},
    }
    for some in found.values():
        assert all(len(times) == 2 and min(one.wall for one in times) > 0 for times in some.values())
        assert len(some["whole"]) == 2


def test_the_plain_side_is_the_published_transform() -> None:
    expected = load_file(GOLDEN / "outputs.safetensors")
    for name, entry in json.loads((GOLDEN / "images.json").read_text())["images"].items():
        image = published_pictures.prepare([np.fromfile(GOLDEN / entry["file"], np.uint8)], SIZE)[0]
        assert torch.allclose(image, expected[f"{name}.clip.{SIZE}"], atol=1e-6), name


@pytest.mark.parametrize("augmentation", ["none", "randaugment_published"])
def test_all_forms_give_the_published_pixels(pictures: list[np.ndarray], augmentation: str) -> None:
    made = forms(pictures, augmentation)
    assert check(made, TRANSFORM, augmentation != "none")["pillow"] == (0, 0.0)
    for form in made.values():
        assert form.whole().shape == (3, 3, SIZE, SIZE)
        for step in form.steps.values():
            step()


def test_a_form_that_differs_is_not_timed(pictures: list[np.ndarray]) -> None:
    made = forms(pictures, "none")
    right = made["torchvision"].whole()
    made["torchvision"] = Form(lambda: right.flip(-1), {})
    with pytest.raises(SystemExit, match="torchvision differs by"):
        check(made, TRANSFORM, False)


def test_photographs_are_the_same_everywhere_and_of_a_usual_size() -> None:
    first, second = photographs(2, 640, 480)
    assert np.array_equal(first, photographs(1, 640, 480)[0])
    assert not np.array_equal(first, second)
    assert all(60_000 < len(one) < 110_000 for one in (first, second))
    header = read_header(shrunk([first], 288)[0])
    assert (header.width, header.height) == (384, 288)


@pytest.mark.parametrize("case", data_loading.TASKS)
def test_pictures_decoded_per_sample(case: str, scenes: Path) -> None:
    plain, ours, held_out = DECODES[case]
    found = data_loading.decodes_per_sample(case, scenes, steps=2)
    assert found["training"].published == plain
    assert 0 < found["training"].ours <= ours
    assert ("evaluation" in found) == (held_out is not None)
    if held_out is not None:
        assert found["evaluation"].published == plain
        assert 0 < found["evaluation"].ours <= held_out
    if ours in (1, 1.5) and plain == 2:  # pairs of pre-training: exactly
        assert found["training"].ours == ours


def test_the_published_loader_reads_a_false_picture_with_each(pictures: list[np.ndarray], tmp_path: Path) -> None:
    write_captions(tmp_path, pictures, 4)
    sources = open_sources(["coco"], tmp_path)
    read = list(published_pictures.read_pictures(sources, [1, 2], "pretrain", np.random.default_rng(0)))
    assert len(read) == 4
    assert np.array_equal(read[0], pictures[1]) and np.array_equal(read[2], pictures[2])
    assert len(list(published_pictures.read_pictures(sources, [1, 2], "vqa", np.random.default_rng(0)))) == 2


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_feeding(pictures: list[np.ndarray], plain: bool, workers: int, tmp_path: Path) -> None:
    write_captions(tmp_path, pictures, 12)
    fed = data_loading.feed(tmp_path, SIZE, 2000.0, workers, 0.05, plain)
    assert 0 <= fed.stall < 1
    assert fed.rate > 0 and fed.cpu > 0


def test_every_micro_batch_is_taken() -> None:
    taken = []
    data_loading._consume(lambda: taken.append(None), 3, 0.0)
    assert len(taken) == data_loading.PREFETCH + 3


def test_times_are_per_picture_and_dalis_steps_follow_from_differences() -> None:
    seconds = {"whole": 0.9, "unaugmented": 0.5, "decode": 0.2, "normalise": 0.1}
    found = milliseconds({step: [Spent(2 * cpu, cpu)] * 3 for step, cpu in seconds.items()}, 10)
    expected = {"whole": 90, "decode": 20, "normalise": 10, "augment": 40, "resize": 20, "clock": 180}
    assert found == pytest.approx(expected)
    rounds = [Spent(1, 2.0), Spent(1, 20.0), Spent(1, 4.0)], [Spent(1, 1.0), Spent(1, 5.0), Spent(1, 1.0)]
    assert ratio(*rounds) == 4.0


def test_resized_pictures_are_advised_where_cores_run_out() -> None:
    whole, small = Stored(300.0, 90e3), Stored(900.0, 35e3)
    few = advise(250.0, whole, small, 288)
    assert "data.workers=1 " in few and "not needed" in few
    many = advise(300e6, whole, small, 288)
    assert "data.workers=1000000 " in many and "3.0 x" in many and "worth it" in many
