"""What a process is doing at the moment, and where its time goes.

Knows the host's clock and names of phases. Knows nothing of what is done in them.

On a GPU the host only hands work over, so `forward`, `backward` and `optimizer` are the time that it takes for
that, and the wait for the device is part of none: nothing here makes the host wait.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

WORK = ("data", "forward", "backward", "optimizer")
REDUCE = "reduce"  # in a collective: it is waited for the others there, too
SHARED = (*WORK, REDUCE)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Slow:
    """A process that keeps the others waiting. share: of the time of a step that it takes longer than the others do,
    0..1; phase: where most of that is."""

    rank: int
    phase: str
    share: float


class Phases:
    """Of one process. `step`: the optimizer step (from 0) that is under way; -1 before the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = -1
        self._clock = clock
        self._now = ("starting", clock())  # replaced as a whole: other threads read it
        self._seconds = dict.fromkeys(SHARED, 0.0)
        self._aside = False

    def now(self) -> tuple[str, float]:
        """(phase, seconds that it has lasted). For any thread."""
        name, since = self._now
        return name, self._clock() - since

    def enter(self, name: str) -> None:
        """From here on this process is in the phase `name`."""
        before, since = self._now
        self._now = (name, self._clock())
        if before in self._seconds and not self._aside:
            self._seconds[before] += self._now[1] - since

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """In the phase `name` inside, then in the former one again."""
        before = self._now[0]
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """The same for what is no part of a step: no time inside is added up."""
        with self.within(name):
            self._aside = True
            try:
                yield
            finally:
                self.enter(name)
                self._aside = False

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, each made in the phase `name`. Closing it closes `items`."""
        made = iter(items)
        try:
            while True:
                with self.within(name):
                    try:
                        item = next(made)
                    except StopIteration:
                        return
                yield item
        finally:
            if hasattr(made, "close"):
                made.close()

    def take(self) -> list[float]:
        """Seconds in each of SHARED since the last call."""
        self.enter(self._now[0])
        taken = [self._seconds[name] for name in SHARED]
        self._seconds = dict.fromkeys(SHARED, 0.0)
        return taken


COLLECTIVES = ("broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "reduce_scatter_tensor",
               "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "all_to_all_single", "all_to_all",
               "barrier", "monitored_barrier", "gather", "scatter")  # fmt: skip


class TimedCollectives:
    """DeepSpeed's communication back end, or the handle of a collective under way, whose calls are in the phase
    `reduce`."""

    def __init__(self, inner: Any, phases: Phases, names: tuple[str, ...] = COLLECTIVES) -> None:
        self.inner, self.phases, self._names = inner, phases, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in self._names:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phases.within(REDUCE):
                result = found(*args, **kwargs)
            return TimedCollectives(result, self.phases, ("wait",)) if hasattr(result, "wait") else result

        return timed


def time_collectives(phases: Phases) -> None:
    """From now on what DeepSpeed sends in this process is in the phase `reduce` of `phases`."""
    from deepspeed.comm import comm

    inner = comm.cdb.inner if isinstance(comm.cdb, TimedCollectives) else comm.cdb
    comm.cdb = TimedCollectives(inner, phases)
