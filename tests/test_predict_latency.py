"""Both forms that `benchmarks.latency` times say the same: texts padded to 50 or to the longest, everything computed or
what is read."""

import pytest
import torch

from benchmarks.latency import HEADS, TOLERANCE, ask_fast, ask_plain, check, make_requests, make_side


@pytest.fixture(scope="module")
def sides():
    """The model of all heads and the one that writes."""
    return {writes: make_side("tiny", None, writes, torch.float32, "cpu") for writes in (False, True)}


@pytest.mark.parametrize("task", list(HEADS))
def test_plain_and_fast_say_the_same(sides, task):
    side = sides[task == "caption"]
    asked = make_requests(task, 5, 2, side.plain.config.vision.image_size)
    assert (len(asked.texts), len(set(asked.first))) == (5, 1 if task == "rank" else 3)
    plain, fast = ask_plain(task, side, asked), ask_fast(task, side, asked)
    assert plain.shape[0] == 5 and plain.float().std() > 0
    check(task, side, plain, fast, TOLERANCE["fp32"])


def test_a_difference_ends_the_run(sides):
    asked = make_requests("match", 3, 1, 96)
    plain, fast = ask_plain("match", sides[False], asked), ask_fast("match", sides[False], asked)
    with pytest.raises(SystemExit, match="match: plain and fast differ by"):
        check("match", sides[False], plain + 1e-2, fast, TOLERANCE["fp32"])
