"""Pictures decoded per sample, and the share of time that training waits for data: the real loaders of every task
against the published procedure. Run by benchmarks/data_pipeline.py."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.published_pictures import prepare, read_pictures
from meter_fast.data.loader import run_ahead
from meter_fast.data.samples import Prepared
from meter_fast.data.sources import Sources
from meter_fast.data.tokenizer import train_tokenizer
from meter_fast.recipes import resolve
from meter_fast.training.pairs import Pairs
from meter_fast.training.tasks import task_of
from meter_fast.training.world import alone

# A recipe, with what is special in it. Scenes have no Flickr30k; retrieval is the same for COCO.
TASKS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "pretrain, negatives of the data set": ("objectives.itm_negatives=dataset",),
    "retrieval_coco": (),
    "vqa": (),
    "nlvr2": (),
    "snli_ve": (),
}
MICRO_BATCH = 16
PREFETCH = 4  # micro-batches prepared ahead while feeding


def open_task(recipe: str, root: Path, settings: list[str]) -> Pairs:
    """The loaders of a recipe at size tiny, as a run of one process on the CPU opens them. root: tables of its task."""
    config = resolve([recipe, "size=tiny", f"data.root={root}", "data.max_bad_share=0", *settings])
    task = task_of(config.objectives.names)
    sources = task.open_sources(config.data)
    config, answers = task.fit(config, sources)
    folder = root / "tokenizer"
    tokenizer = train_tokenizer((sources.read(n).text for n in range(min(200, len(sources)))), folder, vocab_size=400)
    return task.open_data(config, alone("cpu"), sources, tokenizer, folder, 1, torch.float32, answers)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Pictures decoded per sample."""

    published: float
    ours: float


def decodes_per_sample(case: str, root: Path, steps: int = 8) -> dict[str, Decoded]:
    """Of training, and of the held-out texts where these are read by a loader. case: of TASKS. root: tables of scenes.

    Published is what the published loader decodes of the same samples; these are really decoded, too."""
    recipe, settings = case.split(",")[0], TASKS[case]
    sizes = [f"engine.{name}_batch={MICRO_BATCH}" for name in ("global", "micro")]
    held_out = [] if recipe == "retrieval_coco" else [f"data.val_pairs={steps * MICRO_BATCH}"]
    pairs = open_task(recipe, root, ["data.workers=0", *sizes, *held_out, *settings])
    with contextlib.closing(pairs):
        count = _count(pairs)
        with contextlib.closing(pairs.loader.steps(0, steps)) as made:
            trained = [batch for micro in made for batch in micro]
        found = {"training": _compare(recipe, pairs.sources, trained, count.pop())}
        if held_out:
            found["evaluation"] = _compare(recipe, pairs.held_out, list(pairs.validation), count.pop())
    return found


class _Count:
    """Pictures that a back end decoded since the last pop."""

    def __init__(self) -> None:
        self.pictures = 0

    def pop(self) -> int:
        counted, self.pictures = self.pictures, 0
        return counted


def _count(pairs: Pairs) -> _Count:
    """Counts what the back end of `pairs` decodes from now on."""
    count, decode = _Count(), pairs.backend.decode

    def counting(encoded, operations=None):
        count.pictures += len(encoded)
        return decode(encoded, operations)

    pairs.backend.decode = counting
    return count


def _compare(recipe: str, sources: Sources, batches: list, decoded: int) -> Decoded:
    samples = torch.cat([batch.sample_ids for batch in batches]).tolist()
    read = list(read_pictures(sources, samples, recipe, np.random.default_rng(0)))
    assert len(prepare(read, 32)) == len(read)
    return Decoded(len(read) / len(samples), decoded / len(samples))


@dataclasses.dataclass(frozen=True)
class Fed:
    """rate: samples/s that the model took. stall: share of the time that it waited. cpu: seconds of all processors per
    sample."""

    rate: float
    stall: float
    cpu: float


def feed(root: Path, size: int, rate: float, workers: int, seconds: float, published: bool) -> Fed:
    """Pre-training's loader in front of a model that takes `rate` samples/s and is waited for, not computed.

    root: a table of photographs. published: decode and assemble as published in as many threads, two pictures for each
    sample; else the real loader. The first PREFETCH micro-batches fill the queue and do not count."""
    sizes = [f"engine.{name}_batch={MICRO_BATCH}" for name in ("global", "micro")]
    settings = [f"data.workers={workers}", f"data.prefetch={PREFETCH}"]
    settings += [f"model.vision.image_size={size}", f"model.vision.patch_size={size}"]  # the model is not made
    pairs = open_task("pretrain", root, ["data.sources=coco", "data.val_sources=", *sizes, *settings])
    batches = max(PREFETCH, round(seconds * rate / MICRO_BATCH))
    with contextlib.closing(pairs):
        make = _published if published else _ours
        with contextlib.closing(make(pairs, size, workers, PREFETCH + batches)) as made:
            return _consume(lambda: next(made), batches, MICRO_BATCH / rate)


def _ours(pairs: Pairs, size: int, workers: int, batches: int) -> Iterator:
    return pairs.loader.steps(0, batches)


def _published(pairs: Pairs, size: int, workers: int, batches: int) -> Iterator:
    sources = pairs.sources

    def work(step: int) -> Prepared:
        chance = np.random.default_rng(step)
        samples = chance.integers(len(sources), size=MICRO_BATCH).tolist()
        return Prepared(prepare(list(read_pictures(sources, samples, "pretrain", chance)), size))

    return run_ahead(range(batches), work, workers, PREFETCH)


def _consume(take: Callable[[], object], batches: int, pause: float) -> Fed:
    """Takes PREFETCH micro-batches, then `batches`, each followed by `pause` seconds in which a model would compute."""
    for _ in range(PREFETCH):
        take()
        time.sleep(pause)
    waited, began, cpu = 0.0, time.perf_counter(), time.process_time()
    for _ in range(batches):
        asked = time.perf_counter()
        take()
        waited += time.perf_counter() - asked
        time.sleep(pause)
    whole, samples = time.perf_counter() - began, batches * MICRO_BATCH
    return Fed(samples / whole, waited / whole, (time.process_time() - cpu) / samples)
