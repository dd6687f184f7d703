"""Every finding about one host, provoked: by limits, by programs that are not there, or from the values it judges."""

import os
import socket
import subprocess
import sys

import pytest
from asking import answers, asked, distribution, program
from packaging.requirements import Requirement

import meter_fast
from meter_fast.doctor import backends, compilers, devices, disks, limits, network, versions
from meter_fast.doctor.bounded import Answer
from meter_fast.doctor.finding import Finding, fine
from meter_fast.doctor.local import understand


def found(probe, ask) -> dict[str, Finding]:
    """The findings of one probe by name."""
    return {one.name: one for one in probe(ask) if isinstance(one, Finding)}


# ------------------------------------------------------------------------------------------------------------- versions


def test_an_old_version_is_told_with_the_command_that_mends_it(tmp_path, monkeypatch):
    distribution(tmp_path / "site", "torch", "2.1.0")
    distribution(tmp_path / "site", "nvidia_dali_cuda120", "1.3")
    distribution(tmp_path / "site", "flash_attn", "1.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    by_name = answers(asked(tmp_path), "versions")
    assert by_name["torch"].level == "fails" and by_name["torch"].value == "2.1.0, >=2.6 is required"
    assert by_name["torch"].remedy == "pip install 'torch>=2.6'" and by_name["torch"].across == "fails"
    assert by_name["nvidia-dali"].level == "fails" and "1.3" in by_name["nvidia-dali"].value
    assert by_name["flash-attn"].level == "fails"  # optional, but used where it is there
    assert by_name["deepspeed"].level == by_name["python"].level == by_name["timm"].level == "fine"
    assert by_name["meter_fast"].value.startswith(f"{meter_fast.__version__}, ")


def test_a_package_that_is_missing():
    missing = versions._package(Requirement("meter-fast-needs-this>=3"))
    assert (
        missing.level == "fails" and "not installed" in missing.value and "meter-fast-needs-this>=3" in missing.remedy
    )


def test_all_that_setup_requires_is_looked_at(tmp_path):
    python, required, optional = versions.requirements(versions.ROOT / "setup.py")
    assert str(python) == ">=3.10" and [one.name for one in optional] == ["flash-attn"]
    names = {one.name for one in required}
    assert names >= {"torch", "deepspeed", "triton", "transformers", "timm", "nvidia-dali-cuda130", "tensorboard"}
    shown = found(versions.packages, asked(tmp_path))
    assert len(shown) == 1 + len(required) + len(optional)


def test_python_that_is_too_old(tmp_path, monkeypatch):
    setup = "setup(python_requires='>=9', install_requires=[], extras_require={'gpu': []})"
    (tmp_path / "setup.py").write_text(setup)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert found(versions.packages, asked(tmp_path))["python"].level == "fails"


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("newest", "built", "level"),
    [((13, 0), "13.0", "fine"), ((12, 4), "13.0", "fails"), ((13, 0), "12.4", "fine"), ((12, 2), "12.8", "fine"),
     ((12, 2), None, "fine")],
)  # fmt: skip
def test_driver_against_the_cuda_of_torch(newest, built, level):
    one = devices.driver_fits(newest, built, "NVRM version: NVIDIA UNIX Kernel Module  580.65.06  Sun")
    assert one.level == level and one.value.startswith("580.65.06, CUDA ")


@pytest.mark.parametrize(
    ("capability", "built", "level"),
    [
        ((8, 0), ["sm_75", "sm_80", "sm_90"], "fine"),
        ((8, 6), ["sm_80"], "fine"),  # code for an earlier one of the same major version
        ((9, 0), ["sm_90a"], "fine"),
        ((12, 0), ["sm_80", "sm_90"], "fails"),
        ((12, 0), ["sm_90", "compute_90"], "fine"),  # the driver compiles it
        ((7, 0), ["sm_80"], "fails"),
        ((7, 5), ["sm_75", "sm_80"], "remark"),
    ],
)
def test_compute_capability(capability, built, level):
    assert devices.runs_on(capability, built).level == level


@pytest.mark.parametrize(
    ("present", "built", "visible", "level", "says"),
    [(0, "13.0", None, "remark", "CPU"), (2, None, None, "fails", "without CUDA"), (2, "13.0", "", "remark", "hides"),
     (2, "13.0", None, "fails", "sees none")],
)  # fmt: skip
def test_no_gpu(present, built, visible, level, says):
    one = devices.no_gpu(present, built, visible)
    assert one.level == level and says in one.value and one.remedy


@pytest.mark.parametrize(
    ("builds", "cuda", "level"),
    [(["nvidia-dali-cuda130"], "13.0", "fine"), (["nvidia-dali-cuda120"], "13.0", "remark"),
     (["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "13.0", "remark")],
)  # fmt: skip
def test_dali_build(builds, cuda, level):
    assert devices.dali_fits(builds, cuda).level == level


@pytest.mark.parametrize(
    ("slots", "gpus", "cores", "level"), [(8, 8, 64, "fine"), (8, 4, 64, "fails"), (2, 8, 64, "remark"),
                                          (8, 0, 4, "remark"), (2, 0, 4, "fine")],
)  # fmt: skip
def test_slots(slots, gpus, cores, level):
    assert devices.places(slots, gpus, cores).level == level


# ------------------------------------------------------------------------------------------------------------- backends


def test_kernels_that_do_not_fit_the_model(tmp_path):
    wrong = asked(tmp_path, "kernels.cross_attention=triton", "model.fusion.heads=16")
    one = found(backends.kernels, wrong)["kernels"]
    assert one.level == "fails" and "head" in one.value and one.remedy


def test_kernels_are_those_that_a_run_prints(tmp_path):
    by_name = found(backends.kernels, asked(tmp_path, "kernels.mlm_loss=triton", "kernels.text=packed"))
    text = by_name["kernels"].value
    assert "MLM loss triton" in text and "GELU reference" in text and "packed" in text and "no GPU" in text
    assert by_name["Triton"].level == "remark"  # the tests run kernels in the interpreter


@pytest.mark.parametrize("backend", ["auto", "torchvision", "dali"])
def test_pictures_are_decoded(tmp_path, backend):
    one = found(backends.pictures, asked(tmp_path, f"data.backend={backend}"))["pictures"]
    expected = "dali" if backend == "dali" else "torchvision"
    assert one.level == "fine" and one.value == f"{expected} on cpu; data.backend={backend}"


def test_pictures_without_dali(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "meter_fast.data.images_dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    one = found(backends.pictures, asked(tmp_path, "data.backend=dali"))["pictures"]
    assert one.level == "fails" and "pip install nvidia-dali" in one.value and "torchvision" in one.remedy


def test_flash_attention_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c104')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("meter_fast.kernels.varlen_attention.FLASH_ATTN", True)  # it was looked for at import
    one = found(backends.flash_attention, asked(tmp_path))["flash-attn"]
    assert one.level == "remark" and "undefined symbol" in one.value  # a CPU does not use it


def test_precision_and_batch(tmp_path):
    ask = asked(tmp_path, "engine.dtype=fp32", "engine.global_batch=32", "engine.micro_batch=8", slots=2)
    assert "fp32" in found(backends.precision, ask)["precision"].value
    assert found(backends.batch, ask)["global batch"].value == "32 = 2 processes x 8 x 2 accumulated"
    wrong = asked(tmp_path, "engine.global_batch=36", "engine.micro_batch=8", slots=3)
    one = found(backends.batch, wrong)["global batch"]
    assert one.level == "fails" and "engine.micro_batch=" in one.remedy


@pytest.mark.parametrize(("need", "level"), [(50, "fine"), (95, "remark"), (101, "fails")])
def test_what_fits(need, level):
    assert backends._fits("memory", need, 100, "", "less").level == level


def test_memory_of_more_processes_than_fit(tmp_path):
    few = asked(tmp_path, "engine.offload=cpu", slots=1)
    assert {name: one.level for name, one in found(backends.memory, few).items()} == {
        "device memory": "fine", "host memory": "fine"}  # fmt: skip
    ask = asked(tmp_path, "engine.global_batch=200000", "engine.micro_batch=2", slots=100_000)
    assert found(backends.memory, ask)["device memory"].level == "fails"


def test_room_for_checkpoints(tmp_path):
    assert found(backends.checkpoints, asked(tmp_path))["checkpoints"].level == "fine"
    many = found(backends.checkpoints, asked(tmp_path, "run.keep_last=1000000000"))["checkpoints"]
    assert many.level == "remark" and "run.keep_last" in many.remedy


# ------------------------------------------------------------------------------------------------------------ compilers


def test_compilers_that_are_there_compile(tmp_path):
    assert found(compilers.c_compiler, asked(tmp_path))["C compiler"].level == "fine"
    assert found(compilers.cpp_compiler, asked(tmp_path))["C++ compiler"].level == "fine"


def test_no_compilers(tmp_path, monkeypatch):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    one = found(compilers.c_compiler, asked(tmp_path))["C compiler"]
    assert one.level == "remark" and "neither gcc nor clang" in one.value and "apt install gcc" in one.remedy
    assert found(compilers.cpp_compiler, asked(tmp_path))["C++ compiler"].level == "remark"
    needed = found(compilers.cpp_compiler, asked(tmp_path, "engine.compile=true"))["C++ compiler"]
    assert needed.level == "fails" and "engine.compile=true" in needed.value
    assert found(compilers.ninja, asked(tmp_path))["ninja"].level == "remark"
    monkeypatch.setenv("CC", "gcc-77")
    assert "CC=gcc-77 is not there" in found(compilers.c_compiler, asked(tmp_path))["C compiler"].value


def test_compilers_that_do_not_compile(tmp_path, monkeypatch):
    for name in ("gcc", "clang", "g++"):
        program(tmp_path / "bin", name, "#!/bin/sh\necho 'fatal error: stdio.h: No such file' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for probe in (compilers.c_compiler, compilers.cpp_compiler):
        (one,) = found(probe, asked(tmp_path)).values()
        assert one.level == "remark" and "does not compile: fatal error" in one.value


@pytest.mark.parametrize(("release", "level"), [("13.1", "fine"), ("12.4", "remark")])
def test_nvcc(release, level):
    assert compilers.nvcc_fits(release, "13.0", "nvcc").level == level


def test_offload_compiles_nothing_unless_a_file_asks(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    assert not found(compilers.offload, asked(tmp_path))
    assert found(compilers.offload, asked(tmp_path, "engine.offload=cpu"))["offload"].level == "fine"
    forced = found(compilers.offload, asked(tmp_path, "engine.offload=cpu", f"engine.ds_config={own}"))["offload"]
    assert forced.level == "fails" and "zero_force_ds_cpu_optimizer" in forced.remedy


def test_caches(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    by_name = found(compilers.caches, asked(tmp_path))
    assert by_name["TRITON_CACHE_DIR"].level == "remark" and by_name["TORCH_EXTENSIONS_DIR"].level == "fine"
    assert not (tmp_path / "new").exists()


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
