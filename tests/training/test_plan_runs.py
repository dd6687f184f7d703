"""What the plan says of a stage against what two processes really send and keep."""

import json
from collections import Counter

import pytest

pytestmark = pytest.mark.slow

SMALL_BUCKETS = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
SPLIT = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 0}
CASES = [
    {"zero": 0, "dtype": "fp32", "file": SMALL_BUCKETS},
    {"zero": 0, "dtype": "bf16", "file": SMALL_BUCKETS},
    {"zero": 1, "dtype": "bf16", "file": SMALL_BUCKETS},
    {"zero": 2, "dtype": "bf16", "file": SMALL_BUCKETS},
    {"zero": 2, "dtype": "fp32", "file": SMALL_BUCKETS},
    {"zero": 3, "dtype": "bf16", "file": SPLIT},
    {"zero": 3, "dtype": "bf16", "file": {**SPLIT, "stage3_param_persistence_threshold": 2000}},
    {"zero": 3, "dtype": "bf16", "file": {**SPLIT, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}},
]


@pytest.fixture(scope="module")
def results(ranks, tmp_path_factory):
    """All cases in one start of the processes, four pairs of two micro-batches on each."""
    out = tmp_path_factory.mktemp("plan") / "results.json"
    ranks.run(2, out.parent, "plan_workers:look", out=str(out), cases=CASES, timeout=400).check()
    return json.loads(out.read_text())


def reused(result) -> bool:
    return "stage3_max_reuse_distance" not in result["file"]


def test_bytes_of_collectives(results):
    """Gradients once a step at stages 0 and 1 and once a micro-batch at 2 and 3; weights after the update or for each
    micro-batch. Norms and padding to the number of processes are the rest."""
    for result in filter(reused, results):
        planned = Counter()
        for one in result["planned"]:
            planned[one["kind"]] += one["total"]
        assert planned.keys() <= result["sent"].keys(), result
        for kind, size in result["sent"].items():
            assert size == pytest.approx(planned[kind], rel=2e-3, abs=200), (result["zero"], result["dtype"], kind)


def test_stage_0_reduces_in_buckets(results):
    """A bucket is sent when the tensor that fills it is in."""
    for result in results:
        if result["zero"] == 0:
            most = 4 * (SMALL_BUCKETS["reduce_bucket_size"] + result["tensor"])
            assert SMALL_BUCKETS["reduce_bucket_size"] < result["largest"]["all_reduce"] <= most < 4 * result["numbers"]


def test_a_process_alone_reduces_nothing_at_stage_0(ranks, tmp_path):
    """What is left is the norm of the gradients."""
    out = tmp_path / "results.json"
    ranks.run(1, tmp_path, "plan_workers:look", out=str(out), cases=CASES[:2], timeout=200).check()
    for result in json.loads(out.read_text()):
        assert sum(result["sent"].values()) <= 200, result


def test_weights_that_are_not_kept_are_gathered_for_each_pass(results):
    (result,) = (result for result in results if not reused(result))
    planned = sum(one["total"] for one in result["planned"] if one["kind"] == "all_gather")
    assert planned <= result["sent"]["all_gather"] <= 1.3 * planned
    assert max(result["whole"]) < 0.1


def test_stage_3_keeps_all_weights_between_the_passes(results):
    for result in results:
        if result["zero"] == 3 and reused(result):
            assert result["whole"] == [1.0, 1.0]
            assert result["gathered"] == 2 * result["numbers"]


def test_bytes_of_weights_gradients_and_optimizer(results):
    """Between the micro-batches of a step, when gradients are there and activations are not."""
    for result in results:
        least, most = 0.98 * result["state"], 1.02 * result["state"] + result["buckets"]
        if result["zero"] == 3:  # small tensors that stay whole
            most += result["gathered"]
        assert least <= result["kept"] <= most, (result["zero"], result["dtype"], result["kept"] / result["numbers"])
