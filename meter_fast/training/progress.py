"""What the processes tell each other at each step, and the means shown over an interval of steps.

Knows numbers by objective and one collective. Knows nothing of the engine or of how numbers are shown.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from meter_fast.data.batch import Batch
from meter_fast.data.loader import TrainingLoader
from meter_fast.objectives.joint import counts_of
from meter_fast.training.record import StepRecord
from meter_fast.training.world import World


@dataclass(frozen=True)
class News:
    """The same on every process. counts: by objective, what its loss is a mean over, in the coming step. losses,
    correct, count: sums over all micro-batches of the step before."""

    counts: dict[str, float]
    stop: bool
    failed: bool
    not_finite: bool
    losses: dict[str, float] = field(default_factory=dict)
    correct: dict[str, float] = field(default_factory=dict)
    count: dict[str, float] = field(default_factory=dict)
    grad_norm: float | None = None


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
    total = world.sum(mine)
    n = len(names)
    stop, failed, counts = total[0] > 0, total[1] > 0, dict(zip(names, total[2 : 2 + n]))
    if numbers is None:
        return News(counts, stop, failed, False)
    sums = [dict(zip(names, total[3 + (1 + i) * n :])) for i in range(3)]
    return News(counts, stop, failed, total[2 + n] > 0, *sums, norm)


@dataclass(frozen=True)
class Shown:
    """Means over an interval."""

    losses: dict[str, float]
    accuracies: dict[str, float]
    data_wait_share: float


class Interval:
    """Adds steps up between two lines of the log."""

    def __init__(self, names: Sequence[str], loader: TrainingLoader) -> None:
        self._names = names
        self._loader = loader
        self._news: list[News] = []
        self._began, self._waited = time.monotonic(), loader.wait_seconds

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
        now, waited = time.monotonic(), self._loader.wait_seconds
        share = (waited - self._waited) / max(1e-9, now - self._began)
        self._news, self._began, self._waited = [], now, waited
        return Shown({**losses, "total": math.fsum(losses.values())}, right, min(1.0, share))
