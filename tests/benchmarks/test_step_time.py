"""What is said of a step: counts, the numbers made of them, and one measurement at size tiny."""

import math

import numpy as np
import pytest
import torch

from benchmarks.apart import Apart, Work, closing, rounds
from benchmarks.step_cases import CASES, Plan, configuration, make_batch
from benchmarks.step_time import CEILING, UNITS, _metrics, check, count, measure, said
from benchmarks.step_work import PLAIN_VARIANT, largest_resident
from meter_fast.models.config import PARTS

KNOWN = {"plain": 600.0, "fast": 200.0, "estimated_peak": 7.0, "activations": 1.0, "state": 2.0}
ROUNDS = [
    {"seconds": seconds, "loss": 1.5, "last_loss": 1.2, "peak": peak}
    for seconds, peak in ((4.0, 5.0), (2.0, 9.0), (3.0, 6.0))
]


def make_witness() -> Work:
    return lambda: {"peak": float(largest_resident())}


def test_peak_memory_of_a_process_is_its_own() -> None:
    held = np.ones(1 << 28)  # 2 GiB in this process, far more than the other one takes
    sides = [Apart(make_witness)]
    with closing(sides):
        (found,) = rounds({"witness": sides}, 1)["witness"]
    assert 0 < found["peak"] < held.nbytes


def test_numbers_of_a_side() -> None:
    plan = Plan(CASES["pretrain_224"], "tiny", batch=6)
    plain, ours = (_metrics(ROUNDS, KNOWN, name, plan, 1000.0) for name in (PLAIN_VARIANT, "eager"))
    assert ours["time_per_step"] == 3000 and ours["samples_per_second"] == 2 and ours["peak_memory"] == 9
    assert ours["flops_per_sample"] == pytest.approx(200 / 6) and plain["flops_per_sample"] == 100
    assert ours["mfu"] == pytest.approx(200 / 3 / 1000) and ours["published_mfu"] == pytest.approx(600 / 3 / 1000)
    assert plain["mfu"] == plain["published_mfu"]
    assert _metrics(ROUNDS, KNOWN, "plain_kept", plan, 1000.0) == plain
    assert "estimated_peak_memory" not in plain and ours["estimated_peak_memory"] == 7
    several = _metrics(ROUNDS, KNOWN, "eager", Plan(CASES["vqa_576_5"], batch=6), 1000.0)
    assert "estimated_peak_memory" not in several  # it is of a picture a question
    assert set(ours) | {"flop_rate"} == set(UNITS)


@pytest.mark.parametrize(("dtype", "ours", "fine"), [
    ("bf16", 2.05, True), ("bf16", 2.1, False), ("fp32", 2.0001, True), ("fp32", 2.001, False),
    ("fp32", math.nan, False),
])  # fmt: skip
def test_sides_that_train_something_else_are_refused(dtype: str, ours: float, fine: bool) -> None:
    for size, wrong in (("base", "loss"), ("tiny", "loss"), ("tiny", "last_loss")):
        plain = {"loss": 2.0, "last_loss": 2.0}
        plan, metrics = (
            Plan(CASES["pretrain_224"], size, dtype=dtype),
            {"plain": plain, "eager": {**plain, wrong: ours}},
        )
        if fine:
            check(metrics, plan, ["eager"])
        else:
            with pytest.raises(RuntimeError, match=rf"^{wrong} differs: plain 2, eager"):
                check(metrics, plan, ["eager"])


@pytest.mark.parametrize("name", ["pretrain_288", "vqa_576_5", "retrieval_384"])
def test_fewer_flops_than_plain(name: str) -> None:
    counted = count(Plan(CASES[name], "tiny", batch=10))
    plain, ours = (counted[side]["flops_per_sample"] for side in (PLAIN_VARIANT, "eager"))
    assert plain > 1.5 * ours > 0


def test_plain_flops_are_those_of_whole_passes() -> None:
    """Twice as many pairs, twice the work; and what five questions ask of one picture they ask of five."""
    one, two = (count(Plan(CASES["pretrain_224"], "tiny", batch=n))[PLAIN_VARIANT] for n in (4, 8))
    assert one == two
    alone, together = (count(Plan(CASES[name], "tiny", batch=5)) for name in ("vqa_576", "vqa_576_5"))
    assert alone[PLAIN_VARIANT] == together[PLAIN_VARIANT]
    assert alone["eager"]["flops_per_sample"] > 2 * together["eager"]["flops_per_sample"]


def test_the_texts_are_as_long_as_said() -> None:
    plan = Plan(CASES["pretrain_224"], "tiny", batch=200)
    batch = make_batch(plan, configuration(plan))
    assert batch.text_mask.sum(1).float().mean().item() == pytest.approx(13, abs=0.5)
    assert batch.text_ids.shape[1] == plan.longest == 17
    full = Plan(CASES["vqa_576"], "tiny", batch=2, text_tokens=50)
    assert make_batch(full, configuration(full)).text_mask.all()
    assert torch.equal(batch.text_rows, batch.text_mask.flatten().nonzero().flatten())


def test_cases_are_told_apart() -> None:
    plans = [
        Plan(CASES["vqa_576"]),
        Plan(CASES["vqa_576"], zero=3),
        Plan(CASES["vqa_576"], checkpointing=PARTS),
        Plan(CASES["vqa_576"], checkpointing=("vision",)),
    ]
    assert len({said("vqa_576", plan) for plan in plans}) == 4


@pytest.mark.slow
def test_a_measurement() -> None:
    """Both sides by the real engine in processes of their own."""
    found = measure(Plan(CASES["pretrain_224"], "tiny", batch=4, dtype="fp32"), ["eager"], 1, 1)
    assert list(found) == [PLAIN_VARIANT, "eager", CEILING]
    for name in (PLAIN_VARIANT, "eager"):
        assert set(found[name]) <= set(UNITS) and all(value > 0 for value in found[name].values())
    plain, ours = found[PLAIN_VARIANT], found["eager"]
    saved, faster = plain["flops_per_sample"] / ours["flops_per_sample"], ours["mfu"] / plain["mfu"]
    assert plain["time_per_step"] / ours["time_per_step"] == pytest.approx(saved * faster)
