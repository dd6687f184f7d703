"""More that may go wrong on the way: requests to stop at any moment, a closed terminal, disks that refuse, ports."""

import os
import pty
import random
import signal
import socket
import sys
from pathlib import Path

import pytest
from ranks import RankServer, wait_until
from small_run import assert_same_bits, losses, samples, settings, tensors

from meter_fast.training import checkpoint

pytestmark = pytest.mark.slow

SHORT = ("run.max_steps=6", "run.save_every=2", "run.keep_last=9", "engine.dtype=bf16", "engine.micro_batch=2")


@pytest.fixture(scope="module")
def undisturbed(ranks: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of two micro-batches on two processes, to compare with."""
    run = tmp_path_factory.mktemp("undisturbed")
    ranks.train(2, run, settings(data, *SHORT)).check()
    return run


def stop_and_go_on(ranks: RankServer, data: Path, run: Path, undisturbed: Path, fault: str, step: int) -> None:
    """`fault` asks the run to stop: it saves after `step`, and the same command ends as without."""
    ended = ranks.train(2, run, settings(data, *SHORT), fault=fault).check(75)
    assert f"stopped after step {step} " in ended.logs[0] and "Traceback" not in "".join(ended.logs)
    checkpoint.verify(checkpoint.path_of(run / "checkpoints", step))
    ranks.train(2, run, settings(data, *SHORT)).check()
    assert_same_bits(tensors(run, 6), tensors(undisturbed, 6))
    assert losses(run) == losses(undisturbed) and samples(run, 2) == samples(undisturbed, 2)


@pytest.mark.scenario(3, "SIGTERM in the first of two micro-batches: the save waits for the step's end, bit for bit")
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_request_within_a_step_waits_for_its_end(ranks, data, tmp_path, undisturbed, place):
    stop_and_go_on(ranks, data, tmp_path / "run", undisturbed, f"term@rank=1,step=2,micro=0,place={place}", 3)


@pytest.mark.faults
@pytest.mark.scenario(
    6, "SIGTERM at a random step, process and place of it: saved together, and bit for bit as without"
)
@pytest.mark.parametrize("seed", range(20))
def test_a_request_at_any_moment(ranks, data, tmp_path, undisturbed, seed):
    chance = random.Random(seed)
    step, place = chance.randrange(5), chance.choice(["step", "forward", "backward"])
    micro = "" if place == "step" else f",micro={chance.randrange(2)}"
    fault = f"term@rank={chance.randrange(2)},step={step},place={place}{micro}"
    stop_and_go_on(ranks, data, tmp_path / "run", undisturbed, fault, step + 1)


@pytest.mark.faults
@pytest.mark.scenario(7, "a terminal that is closed: the run saves and ends with code 75")
def test_a_closed_terminal(data, tmp_path):
    run = tmp_path / "run"
    program = str(Path(sys.executable).parent / "meter-fast")
    chosen = settings(data, "run.max_steps=100000", "run.save_every=100000", "engine.dtype=fp32")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, program, "train", "pretrain", "size=tiny", f"run.dir={run}", *chosen])

    def running() -> bool:
        os.set_blocking(terminal, False)
        try:
            while os.read(terminal, 1 << 16):
                pass
        except BlockingIOError:
            pass
        return (run / "metrics.jsonl").exists() and len(losses(run)) > 2

    wait_until(running, 240)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    [step] = checkpoint.steps(run / "checkpoints")
    checkpoint.verify(checkpoint.path_of(run / "checkpoints", step))


@pytest.mark.scenario(12, "in a run: one warning, and it is removed at the next save")
def test_a_checkpoint_that_cannot_be_removed(ranks, data, tmp_path):
    run = tmp_path / "run"
    chosen = settings(data, *SHORT, "run.keep_last=1", "run.max_steps=8")
    ended = ranks.train(1, run, chosen, fault="error@place=remove,step=2").check()
    assert ended.logs[0].count("warning: could not remove") == 1 and "step-00000002: the disk has gone" in ended.logs[0]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000008"]


@pytest.mark.scenario(
    10, "a slow file system in a run: steps go on, the next save waits and says so, the result is the same"
)
def test_a_slow_disk(ranks, data, tmp_path, undisturbed):
    run = tmp_path / "run"
    ended = ranks.train(2, run, settings(data, *SHORT), fault="sleep@place=write,step=2,seconds=4").check()
    said = ended.logs[0]
    told = ["step 3/6", "step 4 waits for the checkpoint of step 2", "step-00000002\n", "step 5/6"]
    places = [said.index(text) for text in told]  # the last but one: it is saved
    assert places == sorted(places), said
    assert_same_bits(tensors(run, 6), tensors(undisturbed, 6))


@pytest.mark.scenario(38, "a port that another program holds: told with a free one, exit code 2")
def test_a_port_in_use(ranks, data, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        argv = ["pretrain", "size=tiny", f"run.dir={tmp_path / 'run'}", *settings(data, *SHORT)]
        ended = ranks.run(1, tmp_path / "log", "workers:train_at", argv=argv, port=other.getsockname()[1]).check(2)
    assert "another program listens at" in ended.logs[0] and "--master_port N" in ended.logs[0]
    assert "Traceback" not in ended.logs[0]
