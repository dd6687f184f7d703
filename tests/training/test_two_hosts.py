"""The ways to start a run on several nodes (docs/launch.md), each on two hosts: they give the numbers of one node."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import assert_same_bits, losses, settings, tensors
from two_hosts import ADDRESSES, NAMES, TwoHosts

pytestmark = pytest.mark.multinode

STEPS = ("run.max_steps=6", "run.save_every=3", "engine.zero=2", "engine.dtype=bf16", "run.hang_seconds=600")
PORT = "29611"
MODULE = ("meter_fast.train", "pretrain", "size=tiny")
# On a cluster: torchrun. It is this module.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(hosts: TwoHosts) -> Iterator[None]:
    yield
    hosts.end_all()


@pytest.fixture(scope="module")
def one_node(ranks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one node with two processes."""
    run = tmp_path_factory.mktemp("one-node") / "run"
    ranks.train(2, run, settings(data, *STEPS)).check()
    return run


def same(run: Path, one_node: Path) -> None:
    """Every digit that is logged, and every bit of the last checkpoint."""
    assert losses(run) == losses(one_node) and max(losses(run)) == 6
    assert_same_bits(tensors(run, 6), tensors(one_node, 6))


def environment_file(folder: Path) -> None:
    """What travels to the hosts: the launcher sends hardly any variable by itself."""
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")


def test_the_doctor_asks_both_hosts(hosts, data, tmp_path):
    environment_file(tmp_path)
    words = [sys.executable, "-m", "meter_fast.cli", "doctor", "pretrain", "size=tiny", f"data.root={data}",
             f"run.dir={tmp_path / 'run'}", "--hostfile", str(hosts.hostfile), "--json", str(tmp_path / "found.json"),
             "--only", "versions,devices,network,gloo,disks"]  # fmt: skip
    done = hosts.run(0, words, cwd=tmp_path, seconds=200)
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found["hosts"]) == list(NAMES)
    for name, address in zip(NAMES, ADDRESSES):
        reached = {one["name"]: one for one in found["hosts"][name]["reached"]}
        assert reached["ssh"]["level"] == reached["clock"]["level"] == "fine", reached
        network = {one["name"]: one for one in found["hosts"][name]["areas"]["network"]}
        assert f"eth0 {address}" in network["interfaces"]["value"]
        assert network["host name"]["level"] == "fine", network  # 127.0.1.1, but GLOO_SOCKET_IFNAME travels
    here = {one["name"]: one for one in found["here"]["areas"]["launcher"]}
    assert here["ssh keep-alive"]["value"].endswith("after 9 s"), here
    between = {one["name"]: one for one in found["between"]}
    assert between["gloo"]["level"] == "fine" and f"met at {ADDRESSES[0]}" in between["gloo"]["value"], between


def test_hostfile_and_ssh(hosts, data, tmp_path, one_node):
    environment_file(tmp_path)
    command = ["deepspeed", "--hostfile", str(hosts.hostfile), "--no_ssh_check", "--master_addr", NAMES[0],
               "--master_port", PORT, "--no_local_rank", "--module", *MODULE, f"run.dir={tmp_path / 'run'}",
               *settings(data, *STEPS)]  # fmt: skip
    said = hosts.start(0, command, tmp_path / "log").check()
    assert "node1: " in said and "node2: " in said  # pdsh tells who speaks
    same(tmp_path / "run", one_node)


def both(hosts: TwoHosts, folder: Path, command, **env) -> tuple[str, str]:
    """command(i) on each host. Returns what each says."""
    started = []
    for number in range(2):
        (folder / NAMES[number]).mkdir(exist_ok=True)
        own = {name: value(number) if callable(value) else value for name, value in env.items()}
        started.append(hosts.start(number, command(number), folder / NAMES[number] / "log", **own))
    return tuple(one.check() for one in started)


def test_without_ssh(hosts, data, tmp_path, one_node):
    def command(number: int) -> list[str]:
        return ["deepspeed", "--hostfile", str(hosts.hostfile), "--no_ssh", "--node_rank", str(number), "--master_addr",
                NAMES[0], "--master_port", PORT, "--no_local_rank", "--module", *MODULE, f"run.dir={tmp_path / 'run'}",
                *settings(data, *STEPS)]  # fmt: skip

    both(hosts, tmp_path, command)
    same(tmp_path / "run", one_node)


def test_srun(hosts, data, tmp_path, one_node):
    """What srun does on the hosts: it sets these variables and starts the command."""
    words = [sys.executable, "-m", *MODULE, f"run.dir={tmp_path / 'run'}", *settings(data, *STEPS)]
    both(hosts, tmp_path, lambda number: words, SLURM_JOB_ID="4711", SLURM_STEP_ID="0", SLURM_NTASKS="2",
         SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str, SLURM_LOCALID="0", SLURM_JOB_NODELIST="node[0-2]",
         SLURM_STEP_NODELIST="node[1-2]")  # fmt: skip
    same(tmp_path / "run", one_node)


def test_torchrun(hosts, data, tmp_path, one_node):
    def command(number: int) -> list[str]:
        return [*TORCHRUN, "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr",
                NAMES[0], "--master-port", PORT, "-m", *MODULE, f"run.dir={tmp_path / 'run'}",
                *settings(data, *STEPS)]  # fmt: skip

    both(hosts, tmp_path, command)
    same(tmp_path / "run", one_node)
