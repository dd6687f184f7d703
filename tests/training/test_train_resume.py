"""Stop and go on: bit for bit at the same world size, the same samples and nearly the same losses at any other."""

import shutil
from pathlib import Path

import pytest
import torch
from golden_cases import relative
from ranks import RankServer
from small_run import assert_same_bits, losses, samples, settings, tensors, worst

import meter_fast
from meter_fast.interop import to_meter
from meter_fast.training import checkpoint

pytestmark = pytest.mark.slow

ONE_BF16 = (1, ("engine.zero=2", "engine.dtype=bf16"))  # 2 micro-batches a step
TWO_BF16 = (2, ("engine.zero=2", "engine.dtype=bf16", "engine.micro_batch=2", "model.text.dropout=0.1"))
TWO_FP32 = (
    2,
    ("engine.zero=1", "engine.dtype=fp32", "engine.global_batch=12", "engine.micro_batch=2"),
)  # 3 micro-batches
THREE = (2, ("engine.zero=3", "engine.dtype=bf16", "engine.micro_batch=4", "model.fusion.dropout=0.1"))
NONE_BF16 = (1, ("engine.zero=0", "engine.dtype=bf16", "optim.clip=0"))

SWIN = (
    "model.vision.name=swin", "model.vision.width=64", "model.vision.layers=7", "model.vision.heads=8",
    "model.vision.patch_size=32", "model.vision.image_size=64", "model.vision.drop_path=0.1",
)  # fmt: skip


def copy_of_first_half(run: Path, to: Path, half: int) -> None:
    """What the run's directory held when it had saved after `half` steps, done two more and then been killed."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints" / f"step-{2 * half:08d}", to / "export", to / "logs"):
        shutil.rmtree(folder)
    for path in to.glob("samples-*.jsonl"):
        path.unlink()
    (to / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").open().readlines()[: half + 2]))
    assert checkpoint.steps(to / "checkpoints") == [half]


@pytest.mark.parametrize(("world", "engine"), [ONE_BF16, TWO_BF16, TWO_FP32, THREE, NONE_BF16])
@pytest.mark.scenario(
    2,
    "10 and 10 steps are 20 bit for bit: losses, gradient norms, weights, moments, samples; ZeRO 0 to 3, fp32 "
    "and bf16, 1 to 3 micro-batches, dropout on",
)
@pytest.mark.scenario(1, "the same on one process (cases of this test)")
def test_ten_and_ten_steps_are_twenty_bit_for_bit(ranks: RankServer, data: Path, tmp_path: Path, world, engine):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    half = 3 if engine is THREE[1] else 10  # stage 3 is slow where there is no GPU
    chosen = settings(data, f"run.max_steps={2 * half}", f"run.save_every={half}", *engine)
    ranks.train(world, whole, chosen).check()
    copy_of_first_half(whole, parts, half)
    ranks.train(world, parts, chosen).check()
    assert list(samples(parts, world)) == list(range(half, 2 * half))
    assert samples(whole, world).items() >= samples(parts, world).items()
    assert losses(parts) == losses(whole) and len(losses(whole)) == 2 * half
    assert_same_bits(tensors(parts, 2 * half), tensors(whole, 2 * half))
    exported = {f"weight/{name}": tensor for name, tensor in meter_fast.load_model(parts).state_dict().items()}
    assert_same_bits(exported, {n: t for n, t in tensors(whole, 2 * half).items() if n.startswith("weight/")}, least=60)


@pytest.mark.scenario(
    13, "2, 1 and 4 processes one after another read the samples of one process in its order; losses within 1e-5"
)
def test_another_number_of_processes_sees_the_same_samples(ranks: RankServer, data: Path, tmp_path: Path):
    """2 -> 1 -> 4 processes, with 2, 4 and 1 micro-batches a step, against 20 steps in one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = settings(data, "engine.dtype=fp32", "run.save_every=5", "run.keep_last=9")
    ranks.train(1, whole, [*common, "engine.zero=0", "engine.micro_batch=8"]).check()
    seen = {}
    for world, micro, start, stop in ((2, 2, 0, 5), (1, 2, 5, 15), (4, 2, 15, 20)):
        ended = ranks.run(
            world, parts / f"logs-{start}", "workers:train_until", end=stop,
            argv=["pretrain", "size=tiny", f"run.dir={parts}", *common, "engine.zero=2", f"engine.micro_batch={micro}"],
        )  # fmt: skip
        ended.check(0 if stop == 20 else 75)
        seen.update({step: ids for step, ids in samples(parts, world).items() if start <= step < stop})
        for path in parts.glob("samples-*.jsonl"):
            path.unlink()
    assert seen == samples(whole, 1)
    assert worst(losses(parts), losses(whole)) < 1e-5


@pytest.mark.scenario(
    14, "ZeRO 2, 3 and 1 one after another: the same samples, losses within 1e-3 and moments within 2 % in bf16"
)
def test_another_zero_stage_goes_on(ranks: RankServer, data: Path, tmp_path: Path):
    """Stage 2 -> 3 -> 1 on two processes in bf16, against all at stage 2."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = settings(data, "engine.dtype=bf16", "engine.micro_batch=4", "run.max_steps=6", "run.save_every=2")
    ranks.train(2, whole, [*common, "engine.zero=2"]).check()
    for stage, stop in ((2, 2), (3, 4), (1, 6)):
        argv = ["pretrain", "size=tiny", f"run.dir={parts}", *common, f"engine.zero={stage}"]
        ended = ranks.run(2, parts / f"logs-{stage}", "workers:train_until", end=stop, argv=argv)
        ended.check(0 if stop == 6 else 75)
    assert samples(parts, 2) == samples(whole, 2)
    assert worst(losses(parts), losses(whole)) < 1e-3
    found, expected = tensors(parts, 6), tensors(whole, 6)
    for kind in ("exp_avg/", "exp_avg_sq/"):  # six steps at such rates do not move the losses without them
        names = [name for name in expected if name.startswith(kind)]
        one, other = (torch.cat([run[name].flatten() for name in names]) for run in (found, expected))
        assert relative(one, other) < 0.02, kind


@pytest.mark.parametrize(
    ("encoder", "larger", "change", "tables"),
    [
        ((), 48, "from 5 to 10 rows", "pos_embed"),
        (SWIN, 96, "from 9 to 25 rows", "relative_position_bias_table"),
    ],
    ids=["CLIP", "Swin"],
)
@pytest.mark.scenario(
    18,
    "weights of a checkpoint, an export or a published file at a larger picture size: position tables "
    "resampled, the rest untouched; moments start anew",
)
def test_weights_only_start(ranks: RankServer, data: Path, tmp_path: Path, encoder, larger, change, tables):
    """run.init from a checkpoint, an export and a published file, for larger pictures: the weights, not the step."""
    first = tmp_path / "first"
    short = settings(data, *encoder, "engine.dtype=fp32", "run.max_steps=2")
    ranks.train(1, first, short).check()
    published = tmp_path / "published.ckpt"
    torch.save({"state_dict": to_meter(meter_fast.load_model(first)), "epoch": 3}, published)
    for name, given in (("a", first / "checkpoints" / "step-00000002"), ("b", first / "export"), ("c", published)):
        again = tmp_path / name
        more = [f"run.init={given}", f"model.vision.image_size={larger}", "run.max_steps=1", "optim.warmup=1"]
        ended = ranks.train(1, again, [*short, *more]).check()
        assert change in ended.logs[0]
        before, after = tensors(first, 2), tensors(again, 1)
        changed = [n for n in before if n.startswith("weight/") and n.endswith(tables)]
        assert changed and all(before[n].shape != after[n].shape for n in changed)
        same = [n for n in before if n.startswith("weight/") and n not in changed]
        assert all(before[n].equal(after[n]) for n in same)  # the one step of a warm-up has rate 0


@pytest.mark.parametrize("zero", [1, 3])
def test_what_no_objective_reaches_stays_as_it_is(ranks: RankServer, data: Path, tmp_path: Path, zero):
    """MLM alone leaves the ITM head and the last image layer without a gradient: no decay either, and all is saved."""
    run = tmp_path / "run"
    chosen = settings(
        data, "objectives.names=mlm", f"engine.zero={zero}", "engine.dtype=fp32", "optim.lr=0.1",
        "optim.weight_decay=0.5",
        "optim.warmup=0", "run.max_steps=4", "run.save_every=2",
    )  # fmt: skip
    ended = ranks.train(2, run, chosen).check()
    assert "frozen, as no objective reaches them" in ended.logs[0]
    early, late = tensors(run, 2), tensors(run, 4)
    frozen = [name for name in late if name.startswith("frozen/")]
    assert {"frozen/itm_head.weight", "frozen/fusion.image_pooler.dense.weight"} <= set(frozen)
    assert not any(name.endswith("mlm_head.decoder.weight") for name in frozen)
    assert all(early[name].equal(late[name]) for name in frozen)
    assert not early["weight/mlm_head.decoder.weight"].equal(late["weight/mlm_head.decoder.weight"])
    exported = meter_fast.load_model(run).state_dict()
    assert exported["itm_head.weight"].equal(late["frozen/itm_head.weight"])
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    ranks.train(2, run, chosen).check()
    assert_same_bits(tensors(run, 4), late, least=60)
