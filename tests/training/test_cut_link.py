"""The link between two hosts is cut in the middle of a run: both sides end in time and say who is silent, the command
that started them ends, and goes on when the link is back."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import wait_until
from small_run import assert_same_bits, losses, settings, tensors
from two_hosts import ADDRESSES, NAMES, TwoHosts

from meter_fast.training import checkpoint

pytestmark = pytest.mark.multinode

PEER_SECONDS = 12
PORT = "29612"
STEPS = (
    "run.max_steps=80",
    "run.save_every=10",
    "run.keep_last=99",
    "run.hang_seconds=600",
    f"run.peer_seconds={PEER_SECONDS}",
)
MODULE = ("meter_fast.train", "pretrain", "size=tiny")


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as made:
        yield made


@pytest.fixture(autouse=True)
def as_before(hosts: TwoHosts) -> Iterator[None]:
    yield
    hosts.link(1, "up")
    hosts.end_all()


def cut(hosts: TwoHosts, run: Path, after: int) -> None:
    """Take the link down once `after` steps are logged."""
    wait_until(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) > after, 300)
    hosts.link(1, "down")


def go_on(hosts: TwoHosts, command: list[str], run: Path, folder: Path, undisturbed: Path) -> None:
    """The link is back: the same command ends as the run without a fault did."""
    assert 0 < checkpoint.steps(run / "checkpoints")[-1] < 80
    hosts.link(1, "up")
    said = hosts.start(0, command, folder / "again").check()
    assert "starts from   random weights" not in said
    assert losses(run) == losses(undisturbed)
    assert_same_bits(tensors(run, 80), tensors(undisturbed, 80))


def test_both_sides_end_and_the_command_goes_on(hosts, data, tmp_path, ranks):
    chosen = settings(data, *STEPS, "engine.zero=1")
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    command = ["deepspeed", "--hostfile", str(hosts.hostfile), "--no_ssh_check", "--master_addr", NAMES[0],
               "--master_port", PORT, "--no_local_rank", "--module", *MODULE, f"run.dir={run}", *chosen]  # fmt: skip
    started = hosts.start(0, command, tmp_path / "log")
    cut(hosts, run, 20)
    assert started.ended() != 0, started.said  # without the watch it would be half an hour
    said = started.said  # of node 2 nothing more can come through the cut link
    assert f"ends, because others are gone for {PEER_SECONDS} s (run.peer_seconds)" in said, said
    assert f"rank 1 on node2 ({ADDRESSES[1]}) cannot be reached" in said and "goes on from the last checkpoint" in said
    ranks.train(2, undisturbed, chosen).check()
    go_on(hosts, command, run, tmp_path, undisturbed)


def test_each_side_says_who_is_silent(hosts, data, tmp_path):
    """At ZeRO 2, and started without ssh, so that both sides can be read."""
    run, started = tmp_path / "run", []
    for number, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", *MODULE, f"run.dir={run}", *settings(data, *STEPS)]
        started.append(hosts.start(number, command, tmp_path / name / "log", RANK=str(number), LOCAL_RANK="0",
                                   WORLD_SIZE="2", MASTER_ADDR=NAMES[0], MASTER_PORT=PORT))  # fmt: skip
    cut(hosts, run, 5)
    for number, one in enumerate(started):
        said = one.check(1)
        other = 1 - number
        assert f"error: rank {number} on {NAMES[number]} ({ADDRESSES[number]}) ends" in said
        assert f"rank {other} on {NAMES[other]} ({ADDRESSES[other]}) cannot be reached" in said


def test_a_link_that_is_soon_back_is_waited_for(hosts, data, tmp_path):
    run, started = tmp_path / "run", []
    chosen = settings(data, *STEPS, "run.peer_seconds=60")
    for number, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", *MODULE, f"run.dir={run}", *chosen]
        started.append(hosts.start(number, command, tmp_path / name / "log", RANK=str(number), LOCAL_RANK="0",
                                   WORLD_SIZE="2", MASTER_ADDR=NAMES[0], MASTER_PORT=PORT))  # fmt: skip
    cut(hosts, run, 5)
    time.sleep(8)
    assert max(losses(run)) < 80
    hosts.link(1, "up")
    for one in started:
        one.check()
    assert max(losses(run)) == 80
