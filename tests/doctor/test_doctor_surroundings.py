"""Findings about what surrounds a run on a host, limits, network and disks, provoked."""

import os
import socket
import subprocess
import sys

import pytest
from asking import answers, asked, found, program

from meter_fast.doctor import disks, limits, network
from meter_fast.doctor.bounded import Answer
from meter_fast.doctor.finding import Finding, fine
from meter_fast.doctor.local import understand

# --------------------------------------------------------------------------------------------------------------- limits


def limited(ask, **limits_of) -> dict[str, Finding]:
    """The findings on limits where some are low: setrlimit in a process that then looks."""
    code = "import resource, sys; from meter_fast.doctor.area import main\n"
    code += "".join(f"resource.setrlimit(resource.{name}, ({n}, {n}))\n" for name, n in limits_of.items())
    code += "main(['limits', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", code, ask.to_json()], capture_output=True, text=True)
    return {one.name: one for one in understand("limits", Answer(0, done.stdout, done.stderr), 1, {})}


@pytest.mark.parametrize(("number", "level"), [(64, "fails"), (900, "remark"), (4096, "fine")])
def test_open_files(tmp_path, number, level):
    data = tmp_path / "data"
    data.mkdir()
    for n in range(200):
        (data / f"{n:05}.tar").touch()
    (data / "coco.arrow").touch()
    one = limited(asked(tmp_path, data_root=str(data)), RLIMIT_NOFILE=number)["open files"]
    assert one.level == level and "1 tables, 200 shards, 64 open at most" in one.value
    assert level == "fine" or "ulimit -n 4096" in one.remedy


def test_other_limits(tmp_path):
    by_name = limited(asked(tmp_path), RLIMIT_AS=8 << 30, RLIMIT_NPROC=20)
    assert by_name["address space"].level == "remark" and by_name["address space"].value.startswith("8 GiB")
    assert by_name["threads"].level == "remark"
    if os.path.isdir("/sys/class/infiniband"):
        assert "locked memory" in limited(asked(tmp_path), RLIMIT_MEMLOCK=1 << 16)


@pytest.mark.parametrize(
    ("free", "processes", "gpus", "level"),
    [(64 << 20, 8, True, "fails"), (512 << 20, 8, True, "remark"), (8 << 30, 8, True, "fine"),
     (64 << 20, 8, False, "fine"), (64 << 20, 1, True, "fine")],
)  # fmt: skip
def test_shared_memory(free, processes, gpus, level):
    one = limits.shared_memory_suffices(free, free, processes, gpus)
    assert one.level == level and (level == "fine" or "--shm-size" in one.remedy)


def test_control_groups_of_both_versions(tmp_path):
    files = {
        "job/step/memory.max": "max",
        "job/memory.max": "4000",
        "job/cpu.max": "150000 100000",
        "memory/docker/memory.limit_in_bytes": "3000",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),  # none
        "cpu,cpuacct/docker/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",  # none
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    names = ("memory.max", "memory.limit_in_bytes")
    assert limits.least_limit(tmp_path, "0::/job/step\n", names) == 4000
    assert limits.least_limit(tmp_path, "4:memory:/docker\n", names) == 3000
    assert limits.least_limit(tmp_path, "4:memory:/\n0::/\n", names) is None
    assert limits.cpu_quota(tmp_path, "0::/job/step\n") == 1.5
    assert limits.cpu_quota(tmp_path, "3:cpu,cpuacct:/docker\n") == 0.5
    assert limits.cpu_quota(tmp_path, "3:cpu,cpuacct:/\n") is None


def test_a_memory_limit_is_a_remark(tmp_path, monkeypatch):
    for line in disks.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = tmp_path / controllers / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    one = found(limits.memory, asked(tmp_path))["memory of the control group"]
    assert one.level == "remark" and one.value.startswith("1 GiB of ")


def test_heap(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_gpu_files", list)
    monkeypatch.setattr(limits.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    one = found(limits.heap, asked(tmp_path))["heap"]
    assert one.level == "remark" and one.value.startswith("glibc 2.36") and one.remedy.startswith("export GLIBC_TUNA")
    monkeypatch.setenv(*one.remedy.removeprefix("export ").split("=", 1))
    assert found(limits.heap, asked(tmp_path))["heap"].level == "fine"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert found(limits.heap, asked(tmp_path))["heap"].level == "remark"
    for other in (("glibc", "2.38"), ("glibc", "3.0"), ("", "")):
        monkeypatch.setattr(limits.platform, "libc_ver", lambda other=other: other)
        assert found(limits.heap, asked(tmp_path))["heap"].level == "fine"
    monkeypatch.setattr(limits.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(limits, "_gpu_files", lambda: ["nvidia0"])
    assert found(limits.heap, asked(tmp_path))["heap"].level == "fine"


def test_cores_and_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    many = found(limits.cores, asked(tmp_path, slots=1000))
    assert many["cores"].level == "remark" and many["OMP_NUM_THREADS"].remedy == "export OMP_NUM_THREADS=1"
    assert found(limits.cores, asked(tmp_path, "data.workers=1000"))["cores"].remedy.startswith("data.workers=")
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert "1000 x 2 processes" in found(limits.cores, asked(tmp_path, slots=2))["OMP_NUM_THREADS"].value
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quiet = found(limits.cores, asked(tmp_path, "data.workers=0"))
    assert quiet["cores"].level == "fine" and "OMP_NUM_THREADS" not in quiet


# -------------------------------------------------------------------------------------------------------------- network


@pytest.mark.scenario(38, "doctor: a master port that is taken, and by whom")
def test_a_port_that_is_taken_and_by_whom(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        one = found(network.port, asked(tmp_path, port=number))["master port"]
        assert one.level == "fails" and f"held by process {os.getpid()}" in one.value and "--master_port" in one.remedy
        assert not found(network.port, asked(tmp_path, port=number, first=False))  # not where the main process is
    assert found(network.port, asked(tmp_path, port=network.free_port()))["master port"].level == "fine"


@pytest.mark.parametrize(
    ("addresses", "hosts", "chosen", "level"),
    [(["127.0.1.1"], 2, None, "fails"), (["127.0.1.1"], 2, "eth0", "fine"), (["127.0.1.1"], 0, None, "fine"),
     (["10.0.0.4"], 2, None, "fine"), (["10.0.0.4", "127.0.1.1"], 2, None, "fine")],
)  # fmt: skip
def test_a_name_that_means_the_host_itself(addresses, hosts, chosen, level):
    one = network.resolved("node1", addresses, hosts, chosen)
    assert one.level == level and (level == "fine" or ".deepspeed_env" in one.remedy)


@pytest.mark.parametrize(("hosts", "level"), [(0, "remark"), (2, "fails")])
def test_a_name_that_means_nothing(tmp_path, monkeypatch, hosts, level):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    one = found(network.host_name, asked(tmp_path, hosts=hosts))["host name"]
    assert one.level == level and "does not resolve" in one.value


@pytest.mark.parametrize(
    ("variable", "value", "level"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "fine"),
        ("NCCL_SOCKET_IFNAME", "=eth", "fails"),
        ("NCCL_SOCKET_IFNAME", "=eth0,ib0", "fine"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", "fine"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "fails"),
        ("GLOO_SOCKET_IFNAME", "eth0", "fine"),
        ("GLOO_SOCKET_IFNAME", "eth", "fails"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", "fails"),
    ],
)
@pytest.mark.scenario(38, "doctor: an interface that is named and is not there")
def test_named_interfaces(variable, value, level):
    one = network.named(variable, value, ["eth0", "lo"])
    assert one.level == level and (level == "fine" or "lo" in one.remedy)


def test_interfaces_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    by_name = found(network.interfaces, asked(tmp_path))
    assert "lo 127.0.0.1" in by_name["interfaces"].value and by_name["GLOO_SOCKET_IFNAME"].level == "fails"
    only = {"lo": network.psutil.net_if_stats()["lo"]}
    monkeypatch.setattr(network.psutil, "net_if_stats", lambda: only)
    assert found(network.interfaces, asked(tmp_path, hosts=2))["network"].level == "fails"


def test_address_of_the_first_host(tmp_path, monkeypatch):
    first = asked(tmp_path, hosts=2)
    program(tmp_path / "bin", "hostname", "#!/bin/sh\n[ \"$1\" = -I ] && echo '10.1.2.3 172.17.0.1 '\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert list(network.address(first)) == [("address", "10.1.2.3"), fine("master address",
                                            "10.1.2.3, the first of hostname -I")]  # fmt: skip
    program(tmp_path / "bin", "hostname", "#!/bin/sh\necho 'invalid option' >&2; exit 1\n")
    assert found(network.address, first)["master address"].level == "fails"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(network.address, first)["master address"].level == "unknown"


# ---------------------------------------------------------------------------------------------------------------- disks


MOUNTS = """22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /mnt/with\\040space rw - nfs4 server:/data rw
31 22 0:31 / /data rw - ext4 /dev/sdb rw
32 31 0:32 / /data/bucket rw - fuse.gcsfuse bucket rw
33 31 0:33 / /data rw - lustre fs rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [("/home/me", "ext4", "fine"), ("/mnt/with space/coco", "nfs4", "remark"),
     ("/data/bucket/x", "fuse.gcsfuse", "remark"), ("/data/x", "lustre", "fine"), ("/database", "ext4", "fine")],
)  # fmt: skip
def test_kind_of_file_system(path, kind, level):
    assert disks.kind_of(disks.Path(path), MOUNTS) == kind
    assert disks.kind_suits(disks.Path(path), kind).level == level


def test_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "MOST", 4 << 20)
    one = found(disks.run_directory, asked(tmp_path))["run directory"]
    assert one.level in ("fine", "remark") and "MB/s" in one.value
    assert not list(tmp_path.iterdir())  # nothing is left, and the folder was not made
    (tmp_path / "run").touch()
    below = found(disks.run_directory, asked(tmp_path, run_dir=str(tmp_path / "run" / "a")))["run directory"]
    assert below.level == "fails" and "cannot be written" in below.value
    in_memory = found(disks.run_directory, asked(tmp_path, run_dir="/dev/shm/run"))["run directory"]
    assert in_memory.level == "remark" and "in memory" in in_memory.value


def test_a_slow_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "MOST", 1 << 20)
    monkeypatch.setattr(disks, "SLOW_WRITE", 1e15)
    one = found(disks.run_directory, asked(tmp_path))["run directory"]
    assert one.level == "remark" and "run.save_every" in one.remedy


def test_a_shared_run_directory(tmp_path):
    assert not found(disks.shared, asked(tmp_path))
    (tmp_path / "mark").touch()
    assert found(disks.shared, asked(tmp_path, marker=str(tmp_path / "mark")))["shared run directory"].level == "fine"
    gone = found(disks.shared, asked(tmp_path, marker=str(tmp_path / "gone")))["shared run directory"]
    assert gone.level == "fails" and "all hosts share" in gone.remedy


def test_data_root(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "MOST", 4 << 20)
    assert found(disks.data_root, asked(tmp_path))["data"].level == "unknown"
    missing = found(disks.data_root, asked(tmp_path, data_root=str(tmp_path / "none")))["data"]
    assert missing.level == "fails" and missing.across == "fails"
    data = tmp_path / "data"
    data.mkdir()
    assert found(disks.data_root, asked(tmp_path, data_root=str(data)))["data"].level == "remark"
    (data / "coco.arrow").write_bytes(bytes(1 << 20))
    (data / "00000.tar").touch()
    by_name = found(disks.data_root, asked(tmp_path, data_root=str(data)))
    assert by_name["data"].value.startswith("2 files, 1 MiB") and by_name["reading"].level in ("fine", "remark")
    (data / "coco.arrow").write_bytes(bytes(2 << 20))  # other content is another value for the comparison of hosts
    assert found(disks.data_root, asked(tmp_path, data_root=str(data)))["data"].value != by_name["data"].value
    monkeypatch.setattr(disks, "SLOW_READ", 1e15)
    assert found(disks.data_root, asked(tmp_path, data_root=str(data)))["reading"].level == "remark"


# ----------------------------------------------------------------------------------------------------------------- gloo


def test_two_processes_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert answers(asked(tmp_path), "gloo")["gloo"].level == "fine"


def test_two_processes_do_not_meet_over_an_interface_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    one = answers(asked(tmp_path), "gloo")["gloo"]
    assert one.level == "fails" and "nosuch0" in one.value and "GLOO_SOCKET_IFNAME" in one.remedy
