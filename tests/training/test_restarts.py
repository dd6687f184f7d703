"""meter-fast train --max-restarts: what is started again, what is not, and that nothing is lost on the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import faults
import psutil
import pytest
from ranks import stop, wait_until
from small_run import assert_same_bits, losses, settings, tensors

from meter_fast.restarts import Failure, reason_to_give_up
from meter_fast.training import checkpoint

COMMAND = [str(Path(sys.executable).parent / "meter-fast"), "train"]
SHORT = ("run.max_steps=6", "run.save_every=2", "run.keep_last=9", "engine.dtype=fp32")


def start(run: Path, options: list[str], chosen: list[str], fault: str = "") -> subprocess.Popen:
    """The command in a session of its own, what it says in RUN.log."""
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **(faults.environment(fault) if fault else {}),
    }
    argv = [sys.executable, *COMMAND, *options, "pretrain", "size=tiny", f"run.dir={run}", *chosen]
    with open(run.with_suffix(".log"), "a") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True)


@pytest.mark.parametrize(
    ("before", "now", "restarts", "said"),
    [
        (None, Failure("killed by SIGKILL", 0, 0), 0, ""),  # the first failure says nothing of the next one
        (Failure("", 5, 4), Failure("", 7, 4), 1, ""),
        (Failure("", 5, 4), Failure("", 5, 5), 1, ""),
        (Failure("", 5, 4), Failure("", 5, 4), 1, "no progress since the failure before: step 5 after 5"),
        (Failure("", 5, 4), Failure("", 3, 4), 1, "lower run.save_every"),
        (Failure("", 5, 4, 6), Failure("", 5, 5, 6), 1, "step 6 is not finite again"),
        (Failure("", 5, 4, 6), Failure("", 7, 6, 8), 1, ""),
        (Failure("", 5, 4), Failure("", 9, 8), 3, "3 restarts are used up"),
        (None, Failure("", 9, 8), 3, "3 restarts are used up"),
    ],
)
@pytest.mark.scenario(5, "the rule: not without progress, not for the same NaN, not more often than told")
def test_when_to_give_up(before, now, restarts, said):
    reason = reason_to_give_up(before, now, restarts, 3)
    assert said in reason and bool(said) == bool(reason)


@pytest.mark.slow
@pytest.mark.scenario(5, "two kills through the real launcher, restarted: bit for bit as without")
def test_two_crashes_cost_nothing_but_time(ranks, data, tmp_path):
    """Rank 1 is killed in a backward pass, rank 0 in the middle of a checkpoint. The launcher names whichever process
    it sees first as the cause."""
    whole, run, ledger = tmp_path / "whole", tmp_path / "run", tmp_path / "ledger"
    chosen = settings(data, *SHORT)
    ranks.train(2, whole, chosen).check()
    fault = f"kill@rank=1,step=3,place=backward,ledger={ledger};kill@place=write,step=4,file=1,ledger={ledger}"
    ended = start(run, ["--max-restarts", "2", "--processes", "2"], chosen, fault).wait(300)
    said = run.with_suffix(".log").read_text()
    assert ended == 0, said
    assert len(ledger.read_text().splitlines()) == 2
    assert "the run ended at step 3: " in said and "Restart 1 of 2, from the checkpoint of step 2" in said
    assert "Restart 2 of 2, from the checkpoint of step 2" in said
    assert losses(run) == losses(whole)
    assert_same_bits(tensors(run, 6), tensors(whole, 6))


@pytest.mark.slow
@pytest.mark.scenario(5, "NaN at the same step twice is not tried a third time")
def test_a_step_that_is_not_finite_twice_ends_it(data, tmp_path):
    run = tmp_path / "run"
    ended = start(run, ["--max-restarts", "5"], settings(data, *SHORT), "nan@step=3").wait(200)
    said = run.with_suffix(".log").read_text()
    assert ended == 1 and said.count("Restart") == 1, said
    assert "step 3 is not finite. Restart 1 of 5, from the checkpoint of step 2" in said
    assert "Not started again: step 3 is not finite again" in said


@pytest.mark.slow
@pytest.mark.scenario(5, "exit code 2 is not tried again")
def test_wrong_settings_and_a_full_disk_are_not_tried_again(data, tmp_path):
    run = tmp_path / "run"
    assert start(run, ["--max-restarts", "5"], settings(data, "optim.lrr=1")).wait(100) == 2
    assert start(run, ["--max-restarts", "5"], settings(data, *SHORT), "full-disk@step=2").wait(200) == 2
    said = run.with_suffix(".log").read_text()
    assert "did you mean optim.lr" in said and "No space left on device" in said and "Restart" not in said


@pytest.mark.slow
@pytest.mark.scenario(6, "SIGTERM to the restarting command: the run saves, nothing is restarted, no process stays")
def test_a_request_to_stop_reaches_the_run_and_ends_both(data, tmp_path):
    run = tmp_path / "run"
    chosen = settings(data, "run.max_steps=100000", "run.save_every=100000", "engine.dtype=fp32")
    process = start(run, ["--max-restarts", "5", "--processes", "2"], chosen)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2, 240)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4
    stop(process.pid, signal.SIGTERM)
    assert process.wait(120) == 75
    assert not psutil.wait_procs(family, timeout=1)[1]
    said = run.with_suffix(".log").read_text()
    assert "stopped after step" in said and "Restart" not in said
    [step] = checkpoint.steps(run / "checkpoints")
    checkpoint.verify(checkpoint.path_of(run / "checkpoints", step))


def test_options_that_do_not_go_together(capsys):
    from meter_fast.cli import main

    for words, said in (
        (["--max-restarts", "-1", "pretrain"], "give 0 or more"),
        (["--processes", "0", "pretrain"], "give 1 or more"),
        (["--processes", "2", "--hostfile", "hosts", "pretrain"], "the hostfile tells how many"),
        (["--max-restarts", "1", "ablation", "table=7"], "ablation starts runs of its own"),
    ):
        assert main(["train", *words]) == 2
        assert said in capsys.readouterr().err
