"""Communication, step time and data rates against closed forms worked out by hand."""

import math
from dataclasses import replace

import pytest

from meter_fast.plan.communication import Collective, collectives, seconds
from meter_fast.plan.memory import with_engine
from meter_fast.plan.options import PlanOptions, read_arguments
from meter_fast.plan.step import StepCost
from meter_fast.plan.supply import look_at, published
from meter_fast.plan.timing import UPDATE_BYTES, step_time
from meter_fast.recipes import resolve
from meter_fast.training.memory import Sizes

NUMBERS = 358_000_000
SIZES = Sizes(NUMBERS, 0, NUMBERS, {}, (50_000,) * 160 + (NUMBERS - 8_000_000,))
COST = StepCost(flops=3e11, forward=1e11, checkpointed=4e11, pictures=1.0)
G, M = 4 * NUMBERS, 2 * NUMBERS  # bytes of gradients (fp32) and weights (bf16)


def run(*words: str):
    """8 micro-batches of 32 on 2 nodes of 8."""
    config, _, machine = read_arguments(["pretrain", "nodes=2", "engine.micro_batch=32", *words])
    return config, machine


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, {"all_reduce": G}),
        (1, {"all_reduce": G, "all_gather": M}),
        (2, {"all_reduce": 8 * G, "all_gather": M}),
        (3, {"reduce_scatter": 8 * G, "all_gather": 8 * (M - 16_000_000) + 16_000_000}),
    ],
)
def test_bytes_by_stage(zero, expected):
    config, machine = run(f"engine.zero={zero}")
    found: dict[str, int] = {}
    for one in collectives(config, SIZES, machine.gpus):
        found[one.kind] = found.get(one.kind, 0) + one.total
    assert found == expected
    assert collectives(with_engine(config, micro_batch=512), SIZES, 1) == []


def test_frozen_weights_are_gathered_at_stage_3_and_have_no_gradients():
    half = replace(SIZES, trained=NUMBERS // 2, frozen=NUMBERS // 2)
    for zero, weights in ((1, M // 2), (2, M // 2), (3, 8 * (M - 16_000_000) + 16_000_000)):
        config, machine = run(f"engine.zero={zero}")
        reduced, *gathered = collectives(config, half, machine.gpus)
        assert reduced.size == G // 2 and sum(one.total for one in gathered) == weights


def test_rings_send_the_parts_of_all_others():
    one = Collective("all_reduce", "gradients", 1600, 3, "")
    assert one.sent(16) == 2 * 3 * 1500  # 15 parts of 100 bytes out, and 15 on
    assert replace(one, kind="all_gather").sent(16) == 3 * 1500
    assert replace(one, kind="reduce_scatter").sent(16) == 3 * 1500


def test_the_slower_link_tells():
    one = Collective("all_gather", "weights", 16_000_000_000, 1, "")  # 15 GB sent
    slow = run("link=5", "in_node=300")[1]
    assert seconds(one, slow, 1.0) == pytest.approx(3.0)
    assert seconds(one, slow, 0.5) == pytest.approx(6.0)
    assert seconds(one, run("link=400", "in_node=15")[1], 1.0) == pytest.approx(1.0)
    alone = replace(slow, nodes=1, gpus_per_node=16)  # one node needs no cards
    assert seconds(one, alone, 1.0) == pytest.approx(15 / 300)


def test_step_time_is_passes_and_what_they_do_not_hide():
    config, machine = run("engine.zero=1", "link=10", "tflops=100", "bandwidth=1000")
    time = step_time(config, SIZES, COST, collectives(config, SIZES, 16), machine, 0.5, 1.0)
    assert time.compute == pytest.approx(256 * 3e11 / 50e12)
    assert time.exposed == time.sent == pytest.approx((2 * G + M) * 15 / 16 / 10e9)
    assert time.update == pytest.approx(NUMBERS / 16 * (UPDATE_BYTES + 6) / 1e12)
    assert time.total == pytest.approx(time.compute + time.exposed + time.update)
    assert time.communication_share == pytest.approx(time.exposed / time.total)


@pytest.mark.parametrize(("link", "hidden"), [("100", True), ("2", False)])
def test_stage_2_reduces_beside_the_backward_pass(link, hidden):
    config, machine = run("engine.zero=2", f"link={link}", "tflops=100")
    sent = collectives(config, SIZES, 16)
    time = step_time(config, SIZES, COST, sent, machine, 0.5, 1.0)
    gradients, weights = (seconds(one, machine, 1.0) for one in sent)
    backward = time.compute * 2 / 3
    assert (gradients < backward) is hidden
    assert time.exposed == pytest.approx(weights + max(0.0, gradients - backward))


def test_checkpointing_computes_more():
    config, machine = run()
    on = with_engine(config, activation_checkpointing=True)
    off, more = (step_time(c, SIZES, COST, [], machine, 0.5, 1.0).compute for c in (config, on))
    assert more == pytest.approx(off * 4 / 3)


def test_published_sets_tell_how_many_samples_there_are():
    assert published(resolve(["pretrain"])) == 567_000 + 5_410_000 + 867_000 + 3_010_000
    assert published(resolve(["vqa"])) == 443_757
    assert published(resolve(["retrieval_coco"])) == 414_113 + 152_634
    assert published(resolve(["pretrain", "data.sources=arrow:mine"])) is None
    for recipe in ("nlvr2", "snli_ve", "retrieval_f30k", "caption"):
        assert published(resolve([recipe])), recipe


def test_without_tables_sizes_are_assumed_and_said(tmp_path):
    config = resolve(["pretrain", f"data.root={tmp_path}", "data.sources=arrow:mine"])
    found = look_at(config, PlanOptions())
    assert found.samples is None and found.picture_bytes == 150_000
    assert "no tables" in found.said and "samples=" in found.said and "assumed" in found.said
    given = look_at(config, PlanOptions(samples=7, picture_kb=20))
    assert (given.samples, given.picture_bytes) == (7, 20_000)


def test_tables_tell_samples_and_size(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({
        "image": pa.array([b"x" * 5000] * 40, pa.binary()),
        "caption": pa.array([["one", "two"]] * 40, pa.list_(pa.string())),
    })  # fmt: skip
    with pa.OSFile(str(tmp_path / "mine.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    found = look_at(resolve(["pretrain", f"data.root={tmp_path}", "data.sources=arrow:mine"]), PlanOptions())
    assert found.samples == 80
    assert math.isclose(found.picture_bytes, 5000, rel_tol=0.05)
