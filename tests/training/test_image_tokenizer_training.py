"""An image tokenizer trained by the trainer, and a model that predicts its codes: two processes, resumption, ZeRO-3,
held-out scores, refusals."""

import json
from pathlib import Path

import pytest
import torch
from ranks import RankServer
from small_run import assert_same_bits, settings, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meter_fast
from meter_fast.config import ConfigError
from meter_fast.evaluate import evaluate_split
from meter_fast.models.image_tokenizer import open_image_tokenizer
from meter_fast.recipes import resolve

SMALL = [
    "image_tokenizer.image_size=16", "image_tokenizer.codes=24", "image_tokenizer.code_width=8",
    "image_tokenizer.width=16", "image_tokenizer.blocks=1", "optim.warmup=2",
]  # fmt: skip


def train(ranks: RankServer, world: int, run: Path, data: Path, *more: str, stop_after: int | None = None):
    chosen = [s for s in settings(data, *more) if not s.startswith(("model.", "data.tokenizer"))]
    argv = ["image_tokenizer", "size=tiny", f"run.dir={run}", *SMALL, *chosen]
    if stop_after is not None:
        return ranks.run(world, run / "logs", "workers:train_until", argv=argv, end=stop_after)
    return ranks.run(world, run / "logs", "workers:train", argv=argv)


def shown(run: Path) -> tuple[list[float], list[dict]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"]["reconstruction"] for row in rows if "loss" in row]
    return losses, [row["evaluation"]["reconstruction"] for row in rows if "evaluation" in row]


@pytest.fixture(scope="module")
def tokenizer(ranks: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes; everything below takes what it left."""
    run = tmp_path_factory.mktemp("tokenizer") / "run"
    train(ranks, 2, run, data, "data.val_sources=coco", "run.eval_every=20", "run.picture_every=10").check()
    return run


def test_what_a_run_leaves(tokenizer: Path) -> None:
    losses, scores = shown(tokenizer)
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert scores[-1]["count"] == 8 and scores[-1]["psnr"] > 5 and 0 < scores[-1]["codes_used"] <= 1
    model = open_image_tokenizer(tokenizer)
    assert (model.codes, model.factor, model.config.grid) == (24, 8, 2)
    assert model.encode(torch.rand(3, 3, 16, 16)).shape == (3, 2, 2)
    board = EventAccumulator(str(tokenizer / "tensorboard"))
    board.Reload()
    shown_at = board.Images("held_out/reconstructions")
    assert [(image.step, image.width, image.height) for image in shown_at] == [(10, 64, 32), (20, 64, 32)]
    log = (tokenizer / "logs" / "rank-0.log").read_text()
    assert "model         " in log and "codebook" in log and "kernels       attention" not in log


def test_resumed_run_ends_in_the_same_bits(ranks: RankServer, data: Path, tmp_path: Path) -> None:
    """The codebook too, which is no parameter and which the second process must get from the first."""
    train(ranks, 2, tmp_path / "whole", data, "run.max_steps=8").check()
    train(ranks, 2, tmp_path / "half", data, "run.max_steps=8", stop_after=4).check(75)
    train(ranks, 2, tmp_path / "half", data, "run.max_steps=8").check()
    found = tensors(tmp_path / "half", 8)
    assert found["frozen/codebook.vectors"].any()
    assert_same_bits(found, tensors(tmp_path / "whole", 8), least=20)


@pytest.mark.slow
def test_zero_3_follows_one_process(ranks: RankServer, data: Path, tmp_path: Path) -> None:
    """The same micro-batches, so the same updates of the codebook."""
    chosen = ["engine.dtype=fp32", "run.max_steps=3", "engine.micro_batch=8", "engine.global_batch=8"]
    train(ranks, 1, tmp_path / "one", data, *chosen, "engine.zero=0").check()
    train(ranks, 1, tmp_path / "split", data, *chosen, "engine.zero=3").check()
    one, split = shown(tmp_path / "one")[0], shown(tmp_path / "split")[0]
    assert split == pytest.approx(one, rel=1e-4)


def test_a_model_learns_its_codes(ranks: RankServer, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Both kinds of masked image modelling by names alone, with two processes; held-out scores and the export."""
    argv = settings(
        data, "objectives.names=mlm,itm,mim_in_batch,mim_codes", f"objectives.image_tokenizer={tokenizer}",
        "objectives.mim_negatives=all_ranks", "run.max_steps=4", "run.eval_every=4", "data.val_sources=coco",
        "optim.warmup=1",
    )  # fmt: skip
    ranks.run(
        2, tmp_path / "logs", "workers:train", argv=["pretrain", "size=tiny", f"run.dir={tmp_path}", *argv]
    ).check()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (scores,) = [row["evaluation"] for row in rows if "evaluation" in row]
    assert list(scores) == ["mlm", "itm", "mim_in_batch", "mim_codes"]
    assert scores["mim_codes"]["count"] == scores["mim_in_batch"]["count"] == scores["itm"]["count"]
    model = meter_fast.load_model(tmp_path)
    assert model.config.mim_in_batch_head and model.config.mim_codes_head == 24
    again = evaluate_split(tmp_path, "pretrain", [f"data.root={data}"], device="cpu")
    assert again["mim_codes"]["loss"] == pytest.approx(scores["mim_codes"]["loss"], rel=2e-2)
    assert "1 of 4 cells of a picture hidden; 24 codes of" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_refusals_say_why(ranks: RankServer, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    codes = "objectives.names=mim_codes"
    other = f"objectives.image_tokenizer={tokenizer}"
    for number, (change, said) in enumerate(
        [
            ([codes, f"objectives.image_tokenizer={tmp_path / 'absent'}"], "absent does not exist"),
            ([codes, f"objectives.image_tokenizer={data}"], "config.json does not exist"),
            ([codes, other, "model.vision.patch_size=8"], "train one with image_tokenizer.image_size=32"),
        ]
    ):
        run = tmp_path / f"run-{number}"
        argv = ["pretrain", "size=tiny", f"run.dir={run}", *settings(data), *change]
        ended = ranks.run(1, tmp_path / f"log-{number}", "workers:train", argv=argv).check(2)
        assert said in ended.logs[0] and "Traceback" not in ended.logs[0], ended.logs
    for change, said in (
        (["objectives.names=mim_codes"], r"objectives.image_tokenizer=: mim_codes needs one"),
        (["objectives.names=mim_in_batch", "model.vision.image_size=32"], r"needs two cells or more along a side"),
        (["objectives.mim_probability=0"], r"objectives.mim_probability=0.0: between 0 and 1"),
        (["objectives.names=mlm,reconstruction"], r"reconstruction trains alone"),
        (["objectives.names=mim_code"], r"objectives.names"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(["pretrain", "size=tiny", *change])
    with pytest.raises(ConfigError, match=r"activation_checkpointing"):
        resolve(["image_tokenizer", "engine.activation_checkpointing=true"])
    with pytest.raises(ConfigError, match=r"image_tokenizer.image_size=20 is not a multiple of 8"):
        resolve(["image_tokenizer", "image_tokenizer.image_size=20"])
    assert resolve(["image_tokenizer", "size=base"]).image_tokenizer.grid == resolve(["pretrain"]).model.vision.grid
