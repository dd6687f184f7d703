"""Spikes of the loss are told, and a step can be done again bit for bit."""

import json
import shutil

import pytest
import torch
from small_run import losses, settings

from meter_fast.replay import watched
from meter_fast.training.spikes import WINDOW, Spikes


def test_a_leap_is_told_and_noise_is_not():
    chance = torch.Generator().manual_seed(0)
    noise = (5 + torch.randn(4000, generator=chance)).tolist()
    spikes = Spikes()
    assert [spikes.usual(loss) for loss in noise] == [None] * len(noise)
    assert spikes.usual(30.0) == pytest.approx(5, abs=0.5)
    assert spikes.usual(30.0) is not None  # a spike is no part of what is usual
    assert spikes.usual(5.0) is None


def test_a_falling_loss_and_a_short_run_have_no_spikes():
    spikes = Spikes()
    assert all(spikes.usual(10 / step) is None for step in range(1, 400))
    assert all(Spikes().usual(loss) is None for loss in [1.0] * (WINDOW - 1) + [99.0])


@pytest.mark.scenario(27, "the first module that gave a number that is not finite is named")
def test_the_first_module_that_is_not_finite_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    with torch.no_grad():
        model[1][0].weight.fill_(float("inf"))
    with watched(model) as odd:
        model(torch.ones(1, 2))
    assert odd[0] == "1.0" and "0" not in odd
    with watched(model) as later:
        pass
    model(torch.full((1, 2), float("nan")))
    assert later == []


@pytest.mark.slow
@pytest.mark.scenario(
    29, "a step in the middle done again from the checkpoint before it gives the recorded losses bit for bit"
)
def test_a_step_done_again_gives_the_recorded_loss(ranks, data, tmp_path, record_property):
    """On two processes, from the checkpoint of step 4; another record is told, and the run stays as it was."""
    run = tmp_path / "run"
    chosen = settings(data, "run.max_steps=8", "run.save_every=4", "run.keep_last=9", "engine.micro_batch=2")
    ranks.train(2, run, chosen).check()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())
    ended = ranks.run(2, tmp_path / "replay", "workers:replay", run=str(run), step=7).check()
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())
    said = ended.logs[0]
    assert "as recorded in metrics.jsonl, bit for bit" in said and "starting at 4" in said
    assert str(losses(run)[7][0]) in said
    ids = [json.loads((run / f"samples-{rank}.jsonl").read_text().splitlines()[6])["samples"] for rank in (0, 1)]
    assert f"samples {ids[1][1]}" in said and "rank 1, micro-batch 1" in said
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "metrics.jsonl"
    path.write_text(path.read_text().replace(str(losses(run)[7][0]), "1.5"))
    ended = ranks.run(2, tmp_path / "again", "workers:replay", run=str(other), step=7).check(1)
    assert "recorded: " in ended.logs[0] and "1.5" in ended.logs[0]
    record_property("figure", "largest difference 0")
    said = ranks.run(1, tmp_path / "late", "workers:replay", run=str(run), step=9).check(2).logs[0]
    assert "has steps 1 to 8" in said
