"""Where time goes: phases, the process that keeps others waiting, the loader that does."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import RankServer, stop, wait_until
from small_run import losses, settings

from meter_fast.training.phases import SHARED, Phases
from meter_fast.training.progress import slowest


class Clock:
    """Time that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up():
    clock = Clock()
    phases = Phases(clock)
    assert phases.now() == ("starting", 0.0)
    phases.enter("between steps")
    with phases.within("backward"):
        clock.now += 2
        with phases.within("reduce"):
            clock.now += 3
            assert phases.now() == ("reduce", 3.0)
        clock.now += 1
    clock.now += 10
    assert phases.now() == ("between steps", 10.0)
    assert dict(zip(SHARED, phases.take())) == {"data": 0, "forward": 0, "backward": 3, "optimizer": 0, "reduce": 3}
    assert phases.take() == [0.0] * 5


def test_what_is_aside_adds_nothing():
    clock = Clock()
    phases = Phases(clock)
    with phases.aside("evaluation"):
        clock.now += 1
        with phases.within("reduce"):
            clock.now += 1
    with phases.within("reduce"):
        clock.now += 4
    assert sum(phases.take()) == 4


def test_items_are_made_in_a_phase_and_closed():
    clock, closed = Clock(), []
    phases = Phases(clock)

    def items():
        try:
            for number in range(3):
                clock.now += 1
                yield number
        finally:
            closed.append(True)

    source = items()
    made = phases.each("data", source)
    assert next(made) == 0
    clock.now += 5
    assert next(made) == 1 and phases.take()[0] == 2
    made.close()
    assert closed and list(phases.each("data", items())) == [0, 1, 2]


def rows(*changes: tuple[int, str, float]) -> np.ndarray:
    """Four processes that share a step of 10 s evenly, but for the changes (rank, phase, seconds)."""
    seconds = np.tile([1.0, 2.0, 3.0, 1.0, 3.0], (4, 1))
    for rank, phase, value in changes:
        seconds[rank, SHARED.index(phase)] = value
    return seconds


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer"])
def test_a_slow_process_is_named(phase):
    before = rows()[2, SHARED.index(phase)]
    found = slowest(rows((2, phase, before + 6), (2, "reduce", 0)))
    assert (found.rank, found.phase) == (2, phase) and 0.4 < found.share < 0.5


def test_others_are_not_named():
    assert slowest(rows()) is None
    assert slowest(rows((1, "forward", 2.9))) is None  # a little slower
    assert slowest(rows((1, "reduce", 9.0))) is None  # it waits, or its link is slow: nobody's work
    assert slowest(rows(*((rank, "data", 9.0) for rank in range(4)))) is None  # all alike
    assert slowest(rows((0, "data", 99.0))[:1]) is None  # alone


@pytest.mark.slow
@pytest.mark.parametrize("where", ["data", "forward", "backward", "optimizer"])
@pytest.mark.scenario(34, "a process that keeps the others waiting is named with its phase")
def test_a_rank_that_sleeps_is_named_with_its_phase(ranks: RankServer, data: Path, tmp_path, where):
    """ZeRO-2: the others wait for it in collectives inside backward and optimizer, which is not their work."""
    run = tmp_path / "run"
    argv = ["pretrain", "size=tiny", f"run.dir={run}", *settings(data, "run.max_steps=5", "run.log_every=4")]
    ended = ranks.run(2, run / "logs", "slow_workers:train", argv=argv, where=where, seconds=0.7, on_rank=1).check()
    said = [line for line in ended.logs[0].splitlines() if line.startswith("step ")]
    assert f"rank 1 slow: {where}, +" in said[1], ended.logs[0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["slow"]["rank"] == 1 and rows[1]["slow"]["phase"] == where and rows[1]["slow"]["share"] > 0.5


@pytest.mark.slow
@pytest.mark.scenario(35, "slow decoding: data-bound, with a hint; asked to stop meanwhile, the run saves and ends")
def test_slow_decoding_is_shown_with_a_hint_and_ends_in_order(ranks: RankServer, data: Path, tmp_path):
    run = tmp_path / "run"
    more = ("run.max_steps=9999", "run.save_every=9999", "data.workers=1", "data.prefetch=1")
    argv = ["pretrain", "size=tiny", f"run.dir={run}", *settings(data, *more)]

    def interrupt(pids: list[int]) -> None:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
        for pid in pids:
            stop(pid, signal.SIGTERM)

    ended = ranks.run(2, run / "logs", "slow_workers:train", argv=argv, where="loader thread", seconds=0.7,
                      meanwhile=interrupt, timeout=60).check(75)  # fmt: skip
    assert "data-bound" in ended.logs[0] and ended.logs[0].count("hint: steps wait for data") == 1, ended.logs[0]
    assert "data.workers" in ended.logs[0] and "slow:" not in ended.logs[0]
