"""What the processes tell each other at each step, and the means shown over an interval of steps.

Knows numbers by objective and one collective. Knows nothing of the engine or of how numbers are shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from meter_fast.data.batch import Batch
from meter_fast.objectives.joint import counts_of
from meter_fast.training.phases import SHARED, WORK, Slow
from meter_fast.training.record import StepRecord
from meter_fast.training.world import World

CLEARLY_SLOWER = 0.2  # share of a step


@dataclass(frozen=True)
class News:
    """The same on every process. counts: by objective, what its loss is a mean over, in the coming step. losses,
    correct, count: sums over all micro-batches of the step before. seconds: what it took each process, by phase."""

    counts: dict[str, float]
    stop: bool
    failed: bool
    not_finite: bool
    losses: dict[str, float] = field(default_factory=dict)
    correct: dict[str, float] = field(default_factory=dict)
    count: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    seconds: Sequence[Sequence[float]] = ()


def exchange(
    world: World,
    names: Sequence[str],
    batches: Sequence[Batch],
    record: StepRecord | None,
    stop: bool,
    failed: bool,
) -> News:
    """One small sum over all processes. Collective."""
    numbers = record.read() if record is not None else None
    mine: list[float] = [stop, failed, *counts_of(names, batches).values()]
    norm: float | None = None
    if numbers is not None:
        norm = numbers.grad_norm
        bad = bool(numbers.bad) or (norm is not None and not math.isfinite(norm))
        mine.append(bad)
        # Finite stand-ins, so that one process's NaN does not hide what the others have.
        parts = (numbers.losses, numbers.correct, numbers.count)
        mine += [part[name] if math.isfinite(part[name]) else 0.0 for part in parts for name in names]
        mine += [s if rank == world.rank else 0.0 for rank in range(world.size) for s in record.seconds]
    total = world.sum(mine)
    n = len(names)
    stop, failed, counts = total[0] > 0, total[1] > 0, dict(zip(names, total[2 : 2 + n]))
    if numbers is None:
        return News(counts, stop, failed, False)
    sums = [dict(zip(names, total[3 + (1 + i) * n :])) for i in range(3)]
    seconds = np.reshape(total[3 + 4 * n :], (world.size, len(SHARED))).tolist()
    return News(counts, stop, failed, total[2 + n] > 0, *sums, norm, seconds)


@dataclass(frozen=True)
class Shown:
    """Means over an interval. data_wait_share: of the time of a step that the process which waited longest waited for
    its data, 0..1. slow: if one process is clearly slower than the others."""

    losses: dict[str, float]
    accuracies: dict[str, float]
    data_wait_share: float
    slow: Slow | None


class Interval:
    """Adds steps up between two lines of the log."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._news: list[News] = []

    def add(self, news: News) -> None:
        """One step."""
        self._news.append(news)

    def close(self, micro_batches: int) -> Shown:
        """Means since the last call; a step has `micro_batches` over all processes."""
        losses = {
            n: math.fsum(s.losses[n] for s in self._news) / (len(self._news) * micro_batches) for n in self._names
        }
        counts = {n: math.fsum(s.count[n] for s in self._news) for n in self._names}
        right = {n: math.fsum(s.correct[n] for s in self._news) / max(1.0, counts[n]) for n in self._names}
        waited = math.fsum(max(row[SHARED.index("data")] for row in s.seconds) for s in self._news)
        by_rank = np.sum([s.seconds for s in self._news], axis=0)
        share = waited / max(1e-9, by_rank.sum(axis=1).max())
        self._news = []
        return Shown({**losses, "total": math.fsum(losses.values())}, right, min(1.0, share), slowest(by_rank))


def slowest(seconds: np.ndarray) -> Slow | None:
    """The process that takes clearly longer than the others for its own work, if there is one. seconds [ranks, SHARED];
    those who wait for it do so in `reduce`, which is nobody's work."""
    if len(seconds) < 2:
        return None
    work = seconds[:, : len(WORK)]
    rank = int(work.sum(axis=1).argmax())
    others = np.delete(work, rank, axis=0)
    share = (work[rank].sum() - np.median(others.sum(axis=1))) / max(1e-9, seconds.sum(axis=1).max())
    if share < CLEARLY_SLOWER:
        return None
    return Slow(rank, WORK[int((work[rank] - np.median(others, axis=0)).argmax())], float(share))
