"""What happens when something goes wrong on the way: killed, asked to stop, stuck, not a number, no room, no data."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import RankServer, stop, wait_until
from small_run import assert_same_bits, losses, samples, settings, tensors

from meter_fast.training import checkpoint

pytestmark = pytest.mark.slow

SHORT = ("run.max_steps=6", "run.save_every=2", "run.keep_last=9", "engine.dtype=fp32")


@pytest.fixture(scope="module")
def undisturbed(ranks: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two processes without a fault, to compare with."""
    run = tmp_path_factory.mktemp("undisturbed")
    ranks.train(2, run, settings(data, *SHORT)).check()
    return run


def go_on_and_compare(ranks: RankServer, data: Path, run: Path, undisturbed: Path) -> str:
    """The same command again must end as the run without a fault did, bit for bit. Returns what it said."""
    ended = ranks.train(2, run, settings(data, *SHORT)).check()
    assert_same_bits(tensors(run, 6), tensors(undisturbed, 6))
    assert losses(run) == losses(undisturbed)
    assert samples(run, 2) == samples(undisturbed, 2)
    return ended.logs[0]


@pytest.mark.scenario(
    4, "SIGKILL inside a backward pass: the other process ends with its stack, the same command goes on bit for bit"
)
def test_a_killed_process_ends_the_other_and_the_run_goes_on(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    ended = ranks.train(2, run, settings(data, *SHORT), fault="kill@rank=1,step=3,place=backward", timeout=90)
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] == 1
    assert ended.seconds[0] - ended.seconds[1] < 60
    assert "Error" in ended.logs[0]
    assert checkpoint.steps(run / "checkpoints") == [2]
    go_on_and_compare(ranks, data, run, undisturbed)


@pytest.mark.parametrize("fault", ["term", "hup"])
@pytest.mark.scenario(6, "SIGTERM or SIGHUP to one of two processes: both save the same step")
def test_a_signal_to_one_process_saves_together(ranks, data, tmp_path, undisturbed, fault):
    run = tmp_path / "run"
    ended = ranks.train(2, run, settings(data, *SHORT), fault=f"{fault}@rank=1,step=2").check(75)
    assert "stopped after step 3" in ended.logs[0] and "Traceback" not in "".join(ended.logs)
    assert checkpoint.steps(run / "checkpoints") == [2, 3]
    go_on_and_compare(ranks, data, run, undisturbed)


@pytest.mark.scenario(7, "SIGINT and its echoes save; a second request ends at once")
def test_signals_from_outside_save_and_a_second_one_ends_at_once(ranks, data, tmp_path):
    run = tmp_path / "run"
    long = settings(data, "run.max_steps=100000", "run.save_every=100000", "engine.dtype=fp32")

    def interrupt(pids: list[int]) -> None:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
        for pid in pids:  # as a terminal does, and then a launcher once more
            stop(pid, signal.SIGINT)
            stop(pid, signal.SIGTERM)

    ranks.train(2, run, long, meanwhile=interrupt).check(75)
    step = max(losses(run))
    assert checkpoint.steps(run / "checkpoints") == [step]
    checkpoint.verify(checkpoint.path_of(run / "checkpoints", step))

    def ask_twice(pids: list[int]) -> None:
        wait_until(lambda: max(losses(run)) > step + 2)
        os.kill(pids[1], signal.SIGSTOP)  # so that the first request cannot be answered
        stop(pids[0], signal.SIGTERM)
        time.sleep(5)
        stop(pids[0], signal.SIGTERM)
        stop(pids[1], signal.SIGKILL)

    ended = ranks.train(2, run, long, meanwhile=ask_twice, timeout=60)
    assert ended.codes == [128 + signal.SIGTERM, -signal.SIGKILL]


@pytest.mark.scenario(36, "a process that sleeps: every stack is printed and all end within run.hang_seconds")
def test_a_step_that_hangs_shows_stacks_and_ends(ranks, data, tmp_path):
    run = tmp_path / "run"
    chosen = settings(data, *SHORT, "run.hang_seconds=30")
    ended = ranks.train(2, run, chosen, fault="sleep@rank=1,step=3", timeout=90)
    assert ended.codes == [1, 1]
    assert "no progress for" in ended.logs[1]
    assert "most recent call first" in ended.logs[1] and "faults.py" in ended.logs[1]


@pytest.mark.parametrize(("fault", "said"), [("nan", "the loss of step 3"), ("infinite-gradient", "the gradient of")])
@pytest.mark.parametrize("engine", [("engine.zero=0", "engine.dtype=fp32"), ("engine.zero=2", "engine.dtype=bf16")])
@pytest.mark.scenario(
    27,
    "NaN or infinity on one process: all stop at that step, which names process, micro-batch and samples; no "
    "checkpoint holds it",
)
@pytest.mark.scenario(
    28, "an infinite gradient under a finite loss: the same (there is no fp16 here, and no loss scale)"
)
def test_all_stop_together_when_one_is_not_finite(ranks, data, tmp_path, undisturbed, fault, said, engine):
    """The message names step, process and samples; no checkpoint holds the step."""
    run = tmp_path / "run"
    chosen = settings(data, *SHORT, *engine, "run.save_every=1")
    ended = ranks.train(2, run, chosen, fault=f"{fault}@rank=1,step=3").check(1)
    assert said in ended.logs[0] and "Traceback" not in "".join(ended.logs)
    ids = json.loads((run / "samples-1.jsonl").read_text().splitlines()[3])["samples"]
    assert f"samples {ids[0] if fault == 'nan' else ids}" in ended.logs[0]
    assert "rank 1" in ended.logs[0]
    assert checkpoint.steps(run / "checkpoints") == [1, 2, 3]
    assert "samples" in (run / "not-finite-step-3.json").read_text()
    assert max(losses(run)) == 3


def test_data_that_fails_on_one_process_saves_and_stops_all(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    ended = ranks.train(2, run, settings(data, *SHORT), fault="error@rank=1,step=3,place=data").check(2)
    assert "rank 1: [Errno 5] the disk has gone" in ended.logs[1] and "Traceback" not in "".join(ended.logs)
    assert checkpoint.steps(run / "checkpoints") == [2, 3]
    go_on_and_compare(ranks, data, run, undisturbed)


@pytest.mark.scenario(
    8,
    "SIGKILL in each file of a checkpoint in turn and before the rename: the older one is chosen, the rest is "
    "named and cleared away",
)
def test_killed_while_writing_leaves_the_older_checkpoint(ranks, data, tmp_path):
    """SIGKILL in each file of the second checkpoint in turn, and just before it becomes visible."""
    run = tmp_path / "run"
    chosen = settings(data, *SHORT)
    ranks.train(1, run, [*chosen, "run.max_steps=2", "run.save_every=2"]).check()
    files = [*(checkpoint.path_of(run / "checkpoints", 2)).iterdir()]
    assert len(files) == 5
    for number in range(len(files) + 1):
        victim = tmp_path / f"victim-{number}"
        shutil.copytree(run, victim)
        shutil.rmtree(victim / "logs")
        if number < len(files):
            ended = ranks.train(1, victim, chosen, fault=f"kill@place=write,step=4,file={number}")
        else:
            ended = ranks.train(1, victim, chosen, fault="kill@place=rename,step=4")
        assert ended.codes == [-signal.SIGKILL]
        left = [p.name for p in (victim / "checkpoints").iterdir()]
        assert sorted(n.startswith(".writing-step-00000004") for n in left) == [False, True], left
        choice = checkpoint.newest(victim / "checkpoints")
        assert choice.reader is not None and choice.reader.step == 2
        assert len(choice.passed_over) == 1 and ".writing-step-00000004" in choice.passed_over[0]
    ended = ranks.train(1, victim, chosen).check()  # the last of them goes on, says what it found and clears it away
    assert "left by an interrupted write" in ended.logs[0]
    assert sorted(p.name for p in (victim / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (2, 4, 6)]


@pytest.mark.scenario(
    9,
    "no space while a checkpoint is written beside the steps: all end with one message, nothing half done "
    "stays, the same command goes on bit for bit",
)
def test_no_room_on_the_disk(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    ended = ranks.train(2, run, settings(data, *SHORT), fault="full-disk@step=4,file=1").check(2)
    message = ended.logs[0]
    assert "the checkpoint of step 4 could not be written" in message and "step-00000002" in message
    assert "Traceback" not in "".join(ended.logs)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]  # nothing half done is left
    go_on_and_compare(ranks, data, run, undisturbed)


@pytest.mark.scenario(
    11, "a flipped bit, a missing manifest, a stranger's file: named, passed over, the older one chosen"
)
def test_damaged_checkpoints_are_passed_over_by_name(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    folder = run / "checkpoints"
    broken = folder / "step-00000006" / "exp_avg-000.safetensors"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    (folder / "step-00000004" / "manifest.json").unlink()
    (folder / "model.pt").write_bytes(b"dropped in by someone")
    said = go_on_and_compare(ranks, data, run, undisturbed)
    for name in (str(broken), "step-00000004: no manifest.json", "model.pt: not a checkpoint"):
        assert name in said
    assert f"starts from   {folder / 'step-00000002'}" in said


def test_a_checkpoint_of_another_run_is_refused(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for change, said in (
        ("model.fusion.layers=2", "model.fusion.layers: 1 -> 2"),
        ("engine.global_batch=16", "engine.global_batch: 8 -> 16"),
        ("run.resume=never", "holds checkpoints of steps [2, 4, 6]"),
        (f"run.resume={tmp_path}", "no manifest.json"),
    ):
        ended = ranks.train(1, run, settings(data, *SHORT, change)).check(2)
        assert said in ended.logs[0] and "Traceback" not in ended.logs[0], ended.logs[0]
        (run / "logs" / "rank-0.log").unlink()
    ended = ranks.train(1, run, settings(data, *SHORT, "run.max_steps=8", "optim.lr=0.5")).check()
    assert "changed since the checkpoint: optim.lr: 0.0005 -> 0.5" in ended.logs[0]
    assert max(losses(run)) == 8
