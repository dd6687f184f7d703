"""Findings about what is installed on a host and what computes there, provoked: by programs that are not there, or from
the values they judge."""

import sys

import pytest
from asking import answers, asked, distribution, found, program
from packaging.requirements import Requirement

import meter_fast
from meter_fast.doctor import backends, compilers, devices, versions

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
