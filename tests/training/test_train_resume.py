"""Stop and go on: bit for bit at the same world size, the same samples and nearly the same losses at any other."""

import shutil
from pathlib import Path

import pytest
from ranks import RankServer
from small_run import assert_same_bits, losses, samples, settings, tensors, worst

import meter_fast

pytestmark = pytest.mark.slow

ONE_BF16 = (1, ("engine.zero=2", "engine.dtype=bf16"))  # 2 micro-batches a step
TWO_BF16 = (2, ("engine.zero=2", "engine.dtype=bf16", "engine.micro_batch=2", "model.text.dropout=0.1"))
TWO_FP32 = (2, ("engine.zero=1", "engine.dtype=fp32", "engine.global_batch=12", "engine.micro_batch=2"))  # 3 micro-batches
THREE = (2, ("engine.zero=3", "engine.dtype=bf16", "engine.micro_batch=4"))
NONE_BF16 = (1, ("engine.zero=0", "engine.dtype=bf16", "optim.clip=0"))


def copy_of_first_half(run: Path, to: Path, first: int = 10) -> None:
    """What the run's directory held when it had done `first` steps and was then killed in the steps after."""
    shutil.copytree(run, to)
    for step in (20, 15):
        shutil.rmtree(to / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    for path in (to / "export", to / "logs"):
        shutil.rmtree(path)


@pytest.mark.parametrize(("world", "engine"), [ONE_BF16, TWO_BF16, TWO_FP32, THREE, NONE_BF16])
def test_ten_and_ten_steps_are_twenty_bit_for_bit(ranks: RankServer, data: Path, tmp_path: Path, world, engine):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chosen = settings(data, *engine)
    ranks.train(world, whole, chosen).check()
    copy_of_first_half(whole, parts)
    (parts / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").open().readlines()[:13]))  # died at step 13
    assert (parts / "checkpoints" / "step-00000010").is_dir()
    for path in parts.glob("samples-*.jsonl"):
        path.unlink()
    ranks.train(world, parts, chosen).check()
    assert list(samples(parts, world)) == list(range(10, 20))
    assert samples(whole, world).items() >= samples(parts, world).items()
    assert losses(parts) == losses(whole) and len(losses(whole)) == 20
    assert_same_bits(tensors(parts, 20), tensors(whole, 20))
    exported = meter_fast.load(parts).state_dict()
    assert_same_bits({f"weight/{n}": t for n, t in exported.items()} | others(parts), tensors(whole, 20))


def others(run: Path):
    """The moments of a run's last checkpoint."""
    return {name: t for name, t in tensors(run, 20).items() if not name.startswith("weight/")}


def test_another_number_of_processes_sees_the_same_samples(ranks: RankServer, data: Path, tmp_path: Path):
    """2 -> 1 -> 2 processes, with 2, 4 and 1 micro-batches a step, against 20 steps in one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = settings(data, "engine.dtype=fp32", "run.save_every=5", "run.keep_last=9")
    ranks.train(1, whole, [*common, "engine.zero=0", "engine.micro_batch=8"]).check()
    seen = {}
    for world, micro, start, stop in ((2, 2, 0, 5), (1, 2, 5, 15), (2, 4, 15, 20)):
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


def test_another_zero_stage_goes_on(ranks: RankServer, data: Path, tmp_path: Path):
    """Stage 2 -> 3 -> 1 on two processes in bf16, against all at stage 2."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = settings(data, "engine.dtype=bf16", "engine.micro_batch=4", "run.max_steps=12", "run.save_every=4")
    ranks.train(2, whole, [*common, "engine.zero=2"]).check()
    for stage, stop in ((2, 4), (3, 8), (1, 12)):
        argv = ["pretrain", "size=tiny", f"run.dir={parts}", *common, f"engine.zero={stage}"]
        ended = ranks.run(2, parts / f"logs-{stage}", "workers:train_until", end=stop, argv=argv)
        ended.check(0 if stop == 12 else 75)
    assert samples(parts, 2) == samples(whole, 2)
    assert worst(losses(parts), losses(whole)) < 1e-3


def test_weights_only_start(ranks: RankServer, data: Path, tmp_path: Path):
    """run.init from a checkpoint and from an export, at a larger picture: the weights, not the step."""
    first = tmp_path / "first"
    short = settings(data, "engine.dtype=fp32", "run.max_steps=2")
    ranks.train(1, first, short).check()
    for name, given in (("a", first / "checkpoints" / "step-00000002"), ("b", first / "export")):
        again = tmp_path / name
        more = [f"run.init={given}", "model.vision.image_size=48", "run.max_steps=1", "optim.warmup=1"]
        ended = ranks.train(1, again, [*short, *more]).check()
        assert "resized: vision.pos_embed from 5 to 10 rows" in ended.logs[0]
        before, after = tensors(first, 2), tensors(again, 1)
        assert before["weight/vision.pos_embed"].shape != after["weight/vision.pos_embed"].shape
        same = [n for n in before if n.startswith("weight/") and "pos_embed" not in n]
        assert all(before[n].equal(after[n]) for n in same)  # the one step of a warm-up has rate 0
