"""How many pictures does a core prepare, and does the model wait for them? The published Pillow pipeline against ours
and DALI, in one run, on the same JPEGs.

    python -m benchmarks.data_pipeline [--size 288] [--augment randaugment_published] [--rate 250] [--workers 2]

Published is METER's clip transform (`benchmarks/published_pictures.py`); torchvision is our CPU path; pillow is our
path for the pictures that torchvision does not decode; dali decodes on the CPU or, where there is one, on the GPU.
Before anything is timed, all must give the published pixels, within TOLERANCE. Each is measured in a process of its
own, as what others leave in the heap costs up to a quarter; rounds alternate, and the ratio is of the same round. "Per
core" are processor seconds of all threads, which a busy machine changes less than the clock; the split is of processor
time, too.

Then each task's real loader is asked how many pictures it decodes per sample, and pre-training's feeds a model that
takes --rate samples a second, once with scenes at 96 px as the tiny model reads them (it takes about 250 a second on
one core) and once with the photographs; here, too, rounds alternate, and medians count. Waits are of the clock: on a
busy machine the loader waits for a core as the model would, so look at what a sample takes.
"""

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import data_loading, published_pictures
from benchmarks.apart import Apart, Work, closing, rounds
from benchmarks.latency import Spent, spent
from benchmarks.photographs import photographs, shrunk, write_captions
from benchmarks.record import append
from meter_fast.data.image_check import read_header
from meter_fast.data.images import ImageTransform, denormalise, image_transform, normalise, open_backend
from meter_fast.data.images_torchvision import augment, by_pillow, decode_plain, resize_and_crop
from meter_fast.data.randaugment import NAMES, Operation, RandAugment
from meter_fast.data.scenes import write_scenes

WIDTH, HEIGHT = 640, 480
SCENE = 96  # pixels, what the tiny model reads
STEPS = ("decode", "resize", "augment", "normalise")
# Largest and mean difference from the published pixels, in levels of 255. Augmented, DALI takes a neighbouring pixel
# here and there, which may have any other value.
TOLERANCE = {"pillow": (0, 0.0), "torchvision": (2, 0.02), "dali": (12, 0.5)}
AUGMENTED = {**TOLERANCE, "dali": (255, 2.0)}
Operations = list[tuple[Operation, ...]] | None


@dataclass(frozen=True)
class Form:
    """One way to prepare a batch of pictures. whole: all of it. steps: those that stand apart, each on its own."""

    whole: Callable[[], Tensor]
    steps: dict[str, Callable[[], Any]]


def published(encoded: Sequence[np.ndarray], size: int, operations: Operations) -> Form:
    decoded = [published_pictures.decode(one) for one in encoded]
    drawn = operations or [()] * len(encoded)
    small = [published_pictures.resize(one, size) for one in decoded]
    return Form(
        lambda: published_pictures.prepare(encoded, size, operations),
        {
            "decode": lambda: [published_pictures.decode(one) for one in encoded],
            "resize": lambda: [published_pictures.resize(one, size) for one in decoded],
            "augment": lambda: [published_pictures.augment(*pair) for pair in zip(decoded, drawn, strict=True)],
            "normalise": lambda: published_pictures.normalise(small, size),
        },
    )


def pillow(encoded: Sequence[np.ndarray], transform: ImageTransform, operations: Operations) -> Form:
    drawn = operations or [()] * len(encoded)

    def whole() -> Tensor:
        pictures = [by_pillow(one, read_header(one), transform, own) for one, own in zip(encoded, drawn, strict=True)]
        return torch.stack([normalise(picture, transform, torch.float32) for picture in pictures])

    return Form(whole, {})


def torchvision(encoded: Sequence[np.ndarray], transform: ImageTransform, operations: Operations) -> Form:
    backend = open_backend("torchvision", transform, "cpu", torch.float32)
    decoded = [decode_plain(one, read_header(one)) for one in encoded]
    drawn = operations or [()] * len(encoded)
    small = [resize_and_crop(one, transform) for one in decoded]
    out = torch.empty(len(encoded), 3, transform.size, transform.size)
    return Form(
        lambda: backend.decode(encoded, operations),
        {
            "decode": lambda: [decode_plain(one, read_header(one)) for one in encoded],
            "resize": lambda: [resize_and_crop(one, transform) for one in decoded],
            "augment": lambda: [augment(*pair) for pair in zip(decoded, drawn, strict=True)],
            "normalise": lambda: [normalise(*pair) for pair in _each(small, transform, out)],
        },
    )


def _each(pictures: Sequence[Tensor], transform: ImageTransform, out: Tensor) -> list[tuple]:
    return [(picture, transform, torch.float32, out[row]) for row, picture in enumerate(pictures)]


def dali(encoded: Sequence[np.ndarray], transform: ImageTransform, operations: Operations) -> Form:
    """What resizing and augmenting take is told by differences: the graph is one."""
    from nvidia.dali import fn, pipeline_def, types

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = open_backend("dali", transform, device, torch.float32, max_batch=len(encoded))
    pixels = torch.zeros(len(encoded), 3, transform.size, transform.size, dtype=torch.uint8, device=device)

    @pipeline_def(batch_size=len(encoded), num_threads=1, device_id=0 if device == "cuda" else None)
    def graph():
        source = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(
            source, device="mixed" if device == "cuda" else "cpu", adjust_orientation=False, jpeg_fancy_upsampling=True
        )

    decoder = graph(prefetch_queue_depth=1)
    decoder.build()

    def decode() -> None:
        decoder.feed_input("encoded", list(encoded))
        decoder.run()

    steps = {"decode": decode, "unaugmented": lambda: backend.decode(encoded)}
    steps["normalise"] = lambda: normalise(pixels, transform, torch.float32)
    return Form(lambda: backend.decode(encoded, operations), steps)


def check(forms: dict[str, Form], transform: ImageTransform, augmented: bool) -> dict[str, tuple[int, float]]:
    """Largest and mean difference of each form from the published pixels, in levels. Exits where one is too large."""
    pixels = {name: denormalise(form.whole(), transform).cpu().int() for name, form in forms.items()}
    found = {}
    for name, (most, mean) in (AUGMENTED if augmented else TOLERANCE).items():
        difference = (pixels[name] - pixels["published"]).abs()
        found[name] = int(difference.max()), difference.float().mean().item()
        if found[name][0] > most or found[name][1] > mean:
            raise SystemExit(f"{name} differs by {found[name]} levels from the published pixels, beyond {most, mean}")
    return found


def make_forms(encoded: Sequence[np.ndarray], size: int, operations: Operations) -> dict[str, Callable[[], Form]]:
    """What makes each form, by name."""
    transform = image_transform("clip", size)
    makers: dict[str, Callable[[], Form]] = {"published": partial(published, encoded, size, operations)}
    return makers | {
        form.__name__: partial(form, encoded, transform, operations) for form in (pillow, torchvision, dali)
    }


def make_form(name: str, encoded: Sequence[np.ndarray], size: int, operations: Operations) -> Work:
    """One of them, in a process of its own: carried out whole and in steps."""
    torch.set_num_threads(1)
    form = make_forms(encoded, size, operations)[name]()
    calls = form.steps | {"whole": form.whole}

    def work() -> dict[str, float]:
        taken = {step: spent(call) for step, call in calls.items()}
        return {f"{step} {part}": seconds for step, one in taken.items() for part, seconds in asdict(one).items()}

    return work


def measure(
    encoded: Sequence[np.ndarray], size: int, operations: Operations, count: int
) -> dict[str, dict[str, list[Spent]]]:
    """Form -> step, or "whole" -> each of `count` rounds. Raises RuntimeError where a form fails."""
    names, started = list(make_forms(encoded, size, operations)), []
    with closing(started):
        for name in names:
            started.append(Apart(make_form, name, encoded, size, operations))
        found = rounds({name: [side] for name, side in zip(names, started, strict=True)}, count)
    return {name: _by_step(results) for name, results in found.items()}


def _by_step(results: Sequence[dict[str, float]]) -> dict[str, list[Spent]]:
    steps = dict.fromkeys(key.split()[0] for key in results[0])
    return {step: [Spent(one[f"{step} wall"], one[f"{step} cpu"]) for one in results] for step in steps}


def ratio(plain: list[Spent], fast: list[Spent]) -> float:
    """How many times less processor time, round against round."""
    return statistics.median(one.cpu / other.cpu for one, other in zip(plain, fast, strict=True))


def milliseconds(times: dict[str, list[Spent]], pictures: int) -> dict[str, float]:
    """Per picture: processor time as a whole and of each step, and the clock's as "clock". Of DALI also what follows
    from differences."""
    cpu = {step: 1e3 * statistics.median(one.cpu for one in some) / pictures for step, some in times.items()}
    if "unaugmented" in cpu:
        before = cpu.pop("unaugmented")
        cpu |= {"augment": cpu["whole"] - before, "resize": before - cpu["decode"] - cpu["normalise"]}
    return cpu | {"clock": 1e3 * statistics.median(one.wall for one in times["whole"]) / pictures}


def prepared(arguments: argparse.Namespace, encoded: Sequence[np.ndarray], case: str) -> tuple[list[dict], float]:
    """Rows of pictures per second, and those of our CPU path per core; prints the table."""
    transform = image_transform("clip", arguments.size)
    drawn = None
    if arguments.augment != "none":
        chance = RandAugment(arguments.augment, 0, 1)
        drawn = [chance.operations(number, number) for number in range(len(encoded))]
    made = {name: make() for name, make in make_forms(encoded, arguments.size, drawn).items()}
    differences = check(made, transform, drawn is not None)
    found = measure(encoded, arguments.size, drawn, arguments.rounds)
    times = {name: milliseconds(some, len(encoded)) for name, some in found.items()}
    print(f"{case}\n{'':12}{'images/s core':>14}{'images/s':>10}" + "".join(f"{step:>11}" for step in STEPS)
          + f"{'ratio':>9}  differs by (levels)")  # fmt: skip
    rows = []
    for name, took in times.items():
        faster = ratio(found["published"]["whole"], found[name]["whole"])
        speeds = {"images_per_core_second": 1e3 / took["whole"], "images_per_second": 1e3 / took["clock"]}
        rows += [dict(case=case, variant=name, metric=m, value=v, unit="1/s") for m, v in speeds.items()]
        split = {step: took[step] for step in STEPS if step in took and (drawn or step != "augment")}
        rows += [dict(case=case, variant=name, metric=f"cpu_{s}", value=v, unit="ms") for s, v in split.items()]
        shown = "".join(f"{split[step]:>8.2f} ms" if step in split else f"{'':>11}" for step in STEPS)
        most, mean = differences.get(name, (0, 0.0))
        print(f"{name:12}" + "".join(f"{speed:>{wide}.0f}" for speed, wide in zip(speeds.values(), (14, 10)))
              + f"{shown}{faster:>8.2f}x  {most} at most, {mean:.3f} on average", flush=True)  # fmt: skip
    return rows, 1e3 / times["torchvision"]["whole"]


def decoded(root: Path) -> list[dict]:
    """Rows of pictures decoded per sample; prints them."""
    rows = []
    print(f"\n{'pictures decoded per sample':44}{'published':>10}{'ours':>8}")
    for case in data_loading.TASKS:
        for part, found in data_loading.decodes_per_sample(case, root).items():
            print(f"{f'{case}, {part}':44}{found.published:>10.2f}{found.ours:>8.2f}")
            rows += [dict(case=f"{case}, {part}", variant=name, metric="decodes_per_sample", value=value, unit="1")
                     for name, value in (("published", found.published), ("torchvision", found.ours))]  # fmt: skip
    return rows


def fed(arguments: argparse.Namespace, case: str, root: Path, size: int) -> list[dict]:
    """Rows of waits in front of a model that reads the pictures of `root` at `size` pixels; prints them."""
    case = f"{case}, {arguments.rate:g} samples/s, {arguments.workers} workers"
    rounds: dict[str, list[data_loading.Fed]] = {"published": [], "torchvision": []}
    for _ in range(arguments.feeds):
        for name, found in rounds.items():
            plain = name == "published"
            found.append(data_loading.feed(root, size, arguments.rate, arguments.workers, arguments.seconds, plain))
    rows = []
    print(f"\npre-training, {case}")
    for name, found in rounds.items():
        stall, rate, cpu = (statistics.median(getattr(one, part) for one in found) for part in ("stall", "rate", "cpu"))
        most = max(one.stall for one in found)
        print(f"{name:12} model waits {100 * stall:5.1f} % of the time ({100 * most:.1f} % in the worst round), takes "
              f"{rate:.0f} samples/s; {1e3 * cpu:.2f} ms of a core per sample: {cpu * arguments.rate:.2f} cores",
              flush=True)  # fmt: skip
        rows += [dict(case=case, variant=name, metric="stall_share", value=stall, unit="1"),
                 dict(case=case, variant=name, metric="cpu_per_sample", value=1e3 * cpu, unit="ms")]  # fmt: skip
    return rows


@dataclass(frozen=True)
class Stored:
    """speed: pictures per second that a core of our CPU path prepares. size: bytes of a picture, on average."""

    speed: float
    size: float


def advise(rate: float, whole: Stored, small: Stored, side: int) -> str:
    """Loader threads for `rate` samples/s of pre-training, and whether to store pictures with `side` pixels along the
    short side."""
    cores = os.cpu_count() or 1
    need, less = (math.ceil(rate / stored.speed) for stored in (whole, small))
    verdict = "worth it" if less < need > cores else "not needed"
    return (
        f"{rate:g} samples/s keep {rate / whole.speed:.2f} cores busy: data.workers={need} in one process\n"
        f"pictures stored with {side} px along the short side: {small.speed:.0f}/s per core instead of "
        f"{whole.speed:.0f} ({small.speed / whole.speed:.1f} x), {small.size / 1e3:.0f} KB instead of "
        f"{whole.size / 1e3:.0f}, data.workers={less}; {verdict} with {cores} cores, and not the published pixels"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=288, help="pixels of the model's input")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--augment", choices=("none", *NAMES), default="none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=250.0, help="samples/s that the model takes")
    parser.add_argument("--workers", type=int, default=2, help="loader threads while feeding")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round of feeding, for each form")
    parser.add_argument("--feeds", type=int, default=3, help="rounds of feeding")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoded = photographs(arguments.pictures, WIDTH, HEIGHT)
    case = f"{WIDTH}x{HEIGHT} {arguments.size}px"
    if arguments.augment != "none":
        case += f" {arguments.augment}"
    rows, stored = [], []
    for name, pictures in ((case, encoded), (f"{case}, shrunk before", shrunk(encoded, arguments.size))):
        more, speed = prepared(arguments, pictures, name)
        rows += more
        stored.append(Stored(speed, sum(map(len, pictures)) / len(pictures)))
    with tempfile.TemporaryDirectory() as folder:
        scenes, photos = Path(folder) / "scenes", Path(folder) / "photographs"
        write_scenes(scenes, train=500, val=40, test=20, pixels=SCENE)
        rows += decoded(scenes)
        photos.mkdir()
        write_captions(photos, encoded, 16)
        rows += fed(arguments, f"scenes {SCENE}px", scenes, SCENE)
        rows += fed(arguments, f"{WIDTH}x{HEIGHT} {arguments.size}px", photos, arguments.size)
    print("\n" + advise(arguments.rate, *stored, arguments.size))
    print(f"rows added to {append('data_pipeline', rows)}")


if __name__ == "__main__":
    main()
