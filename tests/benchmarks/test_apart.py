"""Processes that are told to go: in turn, together, with their own surroundings, and what is said when one fails."""

import os
from functools import partial

import pytest

from benchmarks.apart import Apart, Work, closing, rounds, rounds_one_at_a_time


def make_counter(name: str, log: str) -> Work:
    """Writes its name to `log` whenever it goes; gives how often it has, and what RANK says."""
    gone = 0

    def work() -> dict[str, float]:
        nonlocal gone
        gone += 1
        with open(log, "a") as file:
            file.write(name)
        return {"gone": gone, "rank": float(os.environ.get("RANK", -1))}

    return work


def make_failing(at_once: bool) -> Work:
    if at_once:
        raise ValueError("no such thing")
    return lambda: os._exit(3)


def test_rounds_alternate(tmp_path) -> None:
    log = tmp_path / "log"
    sides = [
        Apart(make_counter, "a", str(log)),
        Apart(make_counter, "b", str(log), RANK="1"),
        Apart(make_counter, "b", str(log), RANK="2"),
    ]
    with closing(sides):
        found = rounds({"a": sides[:1], "b": sides[1:]}, 2)
    assert log.read_text() == "abbabbabb"
    assert found == {  # the first round does not count; of a group the largest
        "a": [{"gone": 2, "rank": -1.0}, {"gone": 3, "rank": -1.0}],
        "b": [{"gone": 2, "rank": 2.0}, {"gone": 3, "rank": 2.0}],
    }
    assert not any(side._process.is_alive() for side in sides)


def test_one_at_a_time_each_round_begins_anew(tmp_path) -> None:
    log = tmp_path / "log"
    found = rounds_one_at_a_time({name: partial(Apart, make_counter, name, str(log)) for name in "ab"}, 2)
    assert log.read_text() == "aabbaabb"  # once for what happens once, and once that counts
    assert found == {name: [{"gone": 2, "rank": -1.0}] * 2 for name in "ab"}


@pytest.mark.parametrize(("at_once", "said"), [(True, "ValueError: no such thing"), (False, "exit code 3")])
def test_a_failure_is_said(at_once: bool, said: str) -> None:
    side = Apart(make_failing, at_once)
    with closing([side]), pytest.raises(RuntimeError, match=said):
        side.go()
