"""Micro-batches for training and for evaluation, prepared ahead by threads.

Knows who takes which samples (order.py) and who makes a micro-batch (assemble.py); adds threads, the count of skipped
samples and the stop when there are too many. Nothing here depends on how many threads there are: each micro-batch is
made on its own, delivered in order, and counted when it is delivered.
"""

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from meter_fast.data.assemble import Assembler
from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.false_texts import FalseTexts
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.order import OrderError, SampleOrder, micro_slices, part_pairs, permute
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import BadDataError, Prepared, describe_skips
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline

SHARE_AFTER = 200  # samples before the share of bad ones means anything
EXAMPLES = 5  # names kept per cause
TURN = 5e-4  # seconds that a thread may keep Python's lock while another one waits for it; Python's default is 5e-3

Task = TypeVar("Task")


class SkipCount:
    """What was skipped so far, by cause, and whether it is too much.

    seen: samples delivered. skipped: cause -> count. examples: cause -> the first names.
    """

    def __init__(self, max_share: float):
        if not 0 <= max_share <= 1:
            raise ValueError(f"data.max_bad_share={max_share}: give a share from 0 to 1")
        self.max_share = max_share
        self.seen = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, prepared: Prepared) -> None:
        """Count one micro-batch. Raises BadDataError when the share of skipped samples is above the limit."""
        self.seen += 0 if prepared.batch is None else len(prepared.batch)
        for skip in prepared.skips:
            self.skipped[skip.cause] += 1
            names = self.examples.setdefault(skip.cause, [])
            if len(names) < EXAMPLES:
                names.append(skip.name)
        bad = self.skipped.total()
        tried = self.seen + bad
        if tried >= SHARE_AFTER and bad > self.max_share * tried:
            raise BadDataError(
                f"{bad} of {tried} samples could not be used, more than data.max_bad_share={self.max_share}. "
                + "; ".join(
                    f"{cause}: {count}, first {', '.join(self.examples[cause])}"
                    for cause, count in self.skipped.most_common()
                )
                + ". Repair or leave out these files, or raise the limit"
            )


class MicroBatches(Protocol):
    """Makes a micro-batch of samples [m] int64 at positions [m] int64 of the stream: a pure function of both."""

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared: ...


class TrainingLoader:
    """The micro-batches of one rank, step after step, of any task.

    slices: the positions of the global batch that are this rank's, one for each micro-batch. workers: threads; 0
    prepares in the caller. prefetch: optimizer steps prepared ahead (each is `accumulation` micro-batches in memory),
    at least 1. max_bad_share: stop when more samples than this are bad.

    seen, skipped, skip_examples: see SkipCount. Raises ValueError for numbers that do not fit together.
    """

    def __init__(
        self,
        order: SampleOrder,
        assembler: MicroBatches,
        slices: Sequence[slice],
        workers: int = 2,
        prefetch: int = 2,
        max_bad_share: float = 0.01,
    ):
        if workers < 0 or prefetch < 1:
            raise ValueError(f"data.workers={workers}, data.prefetch={prefetch}: give at least 0 workers and 1 step")
        self.slices = slices
        self.order = order
        self._samples = lru_cache(prefetch + 2)(order.batch)  # a step's micro-batches share its global batch
        self.workers, self.prefetch = workers, prefetch
        self._assembler = assembler
        self._count = SkipCount(max_bad_share)

    @property
    def accumulation(self) -> int:
        """A, micro-batches per optimizer step and rank."""
        return len(self.slices)

    @property
    def seen(self) -> int:
        """Samples delivered so far."""
        return self._count.seen

    @property
    def skipped(self) -> Counter[str]:
        """Samples skipped so far, by cause."""
        return self._count.skipped

    @property
    def skip_examples(self) -> dict[str, list[str]]:
        """The first names of skipped samples, by cause."""
        return self._count.examples

    def steps(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches [A] of the optimizer steps start..stop-1; nothing before `start` is read.

        Errors of the threads come up here, in their place in the order. Closing the iterator ends the threads.
        """
        tasks = ((step, at) for step in range(start, stop) for at in self.slices)
        prepared = run_ahead(tasks, self._prepare, self.workers, self.prefetch * self.accumulation)
        try:
            for _ in range(start, stop):
                parts = list(islice(prepared, self.accumulation))
                for part in parts:
                    self._count.add(part)
                yield [part.batch for part in parts]
                del part, parts  # before threads begin the next: torch gives up Python's lock to free, and would queue
        finally:
            prepared.close()

    def _prepare(self, task: tuple[int, slice]) -> Prepared:
        step, at = task
        positions = np.arange(at.start, at.stop, dtype=np.int64)
        return self._assembler.micro_batch(self._samples(step)[at], positions + step * self.order.global_batch)


class PretrainLoader(TrainingLoader):
    """The micro-batches of (picture, caption) pairs of one rank.

    rank, world, micro_batch, accumulation: must divide order's global batch (micro_slices). max_image_pixels: larger
    pictures count as bad. cells: for masked image modelling. augment: what pictures undergo. false_texts: for
    retrieval. The rest: see TrainingLoader. Raises OrderError or ValueError for numbers that do not fit.
    """

    def __init__(
        self,
        sources: Sources,
        order: SampleOrder,
        text: TextPipeline,
        images: ImageBackend,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch: int,
        accumulation: int | None = None,
        negatives: str = "batch",
        seed: int = 0,
        workers: int = 2,
        prefetch: int = 2,
        max_bad_share: float = 0.01,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        cells: CellMasking | None = None,
        augment: RandAugment | None = None,
        false_texts: FalseTexts | None = None,
    ):
        if negatives == "batch" and not order.parts_pairs:
            raise OrderError(
                "objectives.itm_negatives=batch needs an order that was made with image_ids=sources.image_ids"
            )
        slices = micro_slices(order.global_batch, world, micro_batch, rank, accumulation, negatives == "batch")
        assembler = Assembler(
            sources, text, images, seed, negatives, max_image_pixels, cells=cells, augment=augment,
            false_texts=false_texts,
        )  # fmt: skip
        super().__init__(order, assembler, slices, workers, prefetch, max_bad_share)


class SplitLoader:
    """Every sample of a split once, batch after batch, of any task; iterate it as often as you like.

    samples [n] int64; shares: the positions 0..n-1 of each batch, which also key what the assembler draws. in_step:
    processes score as many batches together, so one without a usable sample is an error; else it is passed over.
    skipped, skip_examples: of the latest pass.
    """

    def __init__(
        self,
        samples: np.ndarray,
        shares: Sequence[np.ndarray],
        assembler: MicroBatches,
        workers: int = 0,
        max_bad_share: float = 0.01,
        in_step: bool = True,
    ):
        self.samples, self._shares, self._assembler = samples, shares, assembler
        self._workers, self._max_bad_share, self._in_step = workers, max_bad_share, in_step
        self._count = SkipCount(max_bad_share)

    def dealt(self, rank: int, world: int) -> "SplitLoader":
        """Of the batches of a loader for one process those that fall to one of `world`, maybe none: whatever their
        number, the same batches are scored."""
        own = self._shares[rank::world]
        return SplitLoader(self.samples, own, self._assembler, self._workers, self._max_bad_share, in_step=False)

    def __len__(self) -> int:
        """Number of batches; where processes go in step the same on every rank."""
        return len(self._shares)

    @property
    def skipped(self) -> Counter[str]:
        """Samples left out in the latest pass, by cause."""
        return self._count.skipped

    @property
    def skip_examples(self) -> dict[str, list[str]]:
        """The first names of samples left out, by cause."""
        return self._count.examples

    def __iter__(self) -> Iterator[Any]:
        """Raises BadDataError when too many samples are bad, or, in step, all of one batch."""
        self._count = SkipCount(self._max_bad_share)
        prepared = run_ahead(self._shares, self._prepare, self._workers, 2)
        try:
            for part in prepared:
                self._count.add(part)
                if part.batch is not None:
                    yield part.batch
                elif self._in_step:
                    raise BadDataError(describe_skips("no sample of an evaluation batch could be used", part.skips))
        finally:
            prepared.close()

    def _prepare(self, positions: np.ndarray) -> Prepared:
        return self._assembler.micro_batch(self.samples[positions], positions)


class EvaluationLoader(SplitLoader):
    """Every pair of a split once, in one fixed order, for evaluation.

    The order is a permutation that depends on the seed alone, so `limit` samples are a fair draw, and neighbours are
    ITM pairs of different pictures (all negatives come from the batch). Each rank gets the same number of batches, of
    at most batch_size samples (but see evaluation_shares). A bad sample is left out and counted, never replaced; its
    partner then matches.

    Raises OrderError when ranks would be left without samples.
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        seed: int = 0,
        workers: int = 0,
        max_bad_share: float = 0.01,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        cells: CellMasking | None = None,
    ):
        count = len(sources) if limit is None else min(limit, len(sources))
        samples = permute(np.arange(count), len(sources), (seed, _EVALUATION))
        even = count - count % 2
        samples[:even] = part_pairs(samples[:even], sources.image_ids(samples[:even]), 0)
        shares = evaluation_shares(count, batch_size, rank, world)
        assembler = Assembler(sources, text, images, seed, "batch", max_image_pixels, False, cells)
        super().__init__(samples, shares, assembler, workers, max_bad_share)


_EVALUATION = 5  # purpose of the permutation of a held-out split
SMALLEST_EVALUATION = (
    4  # samples in a batch: with single pairs ranks of unequal shares could not have equally many batches
)


def evaluation_shares(count: int, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """Positions 0..count-1 cut into batches: one list per rank, equally long, none empty, each position once in all.

    Pairs 2i, 2i+1 stay together; a batch holds at most batch_size samples, or SMALLEST_EVALUATION where that is more.
    Raises OrderError when there are fewer pairs than ranks.
    """
    pairs = -(-count // 2)
    per_batch = max(SMALLEST_EVALUATION, batch_size) // 2
    if pairs < world:
        raise OrderError(f"evaluation of {count} samples on {world} ranks: each rank needs 2; use more samples")
    most = -(-pairs // world)  # pairs of the rank that has most
    batches = -(-most // per_batch)
    own = np.array_split(np.arange(pairs), world)[rank]
    shares = []
    for share in np.array_split(own, batches):
        positions = np.arange(2 * share[0], 2 * share[-1] + 2, dtype=np.int64)
        shares.append(positions[positions < count])
    return shares


def run_ahead(tasks: Iterable[Task], work: Callable[[Task], Prepared], workers: int, ahead: int) -> Iterator[Prepared]:
    """work(task) for each task, in order, with up to `ahead` tasks under way or waiting for the caller.

    workers=0 works in the caller. An error of a task is raised where its result would come, with the thread's
    traceback. Closing the iterator drops what has not begun and waits for what has.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    todo = iter(tasks)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    try:
        with _short_turns():
            pending = deque(pool.submit(work, task) for task in islice(todo, ahead))
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(work, task) for task in islice(todo, 1))
                yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Python's threads take turns of at most TURN.

    Threads that prepare pictures give up Python's lock for moments and take it again before another one has woken, so
    that the caller gets it only when a turn is over: at each of the many times it gave it up itself.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
