"""The GPUs, their driver, and whether torch and DALI are built for them. What follows from plain values is told by
functions of plain values."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from meter_fast.doctor.finding import Asked, Finding, amount, fine
from meter_fast.doctor.versions import DALI, dali_distributions

DRIVER = Path("/proc/driver/nvidia/version")


def gpus(asked: Asked) -> Iterator[Finding]:
    """What torch sees."""
    import torch

    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        seen = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        kinds = {(one.name, one.total_memory) for one in seen}
        what = ", ".join(f"{one[0]} {amount(one[1])}" for one in sorted(kinds))
        if len(kinds) > 1:
            yield Finding("GPUs", "remark", f"{len(seen)}: {what}", "all wait for the slowest: choose alike ones with "
                          "CUDA_VISIBLE_DEVICES", "remark")  # fmt: skip
        else:
            yield fine("GPUs", f"{len(seen)} x {what}", "remark")
        built = torch.cuda.get_arch_list()
        for capability in sorted({(one.major, one.minor) for one in seen}):
            yield runs_on(capability, built)
    else:
        yield no_gpu(present, torch.version.cuda, hidden)


def no_gpu(present: int, built: str | None, visible: str | None) -> Finding:
    """Where torch sees no GPU. present: device files; built: torch's CUDA; visible: CUDA_VISIBLE_DEVICES."""
    if not present:
        return Finding("GPUs", "remark", "none: runs use the CPU", "small models train; take a machine with GPUs for "
                       "others", "fails")  # fmt: skip
    if built is None:
        return Finding("GPUs", "fails", f"{present} are there, and torch is built without CUDA", "pip install torch "
                       "from an index with CUDA builds", "fails")  # fmt: skip
    if visible is not None and visible.strip() in ("", "-1"):
        return Finding("GPUs", "remark", f"{present} are there, CUDA_VISIBLE_DEVICES={visible!r} hides them",
                       "unset CUDA_VISIBLE_DEVICES", "fails")  # fmt: skip
    return Finding("GPUs", "fails", f"{present} are there, torch for CUDA {built} sees none", "look at nvidia-smi; "
                   "in a container start it with --gpus all", "fails")  # fmt: skip


def runs_on(capability: tuple[int, int], built: list[str]) -> Finding:
    """Whether a torch built for the architectures `built` (["sm_80", ...]) has code for a GPU of that capability, or
    code that its driver can compile."""
    from meter_fast.models.meter import AMPERE

    name, text = "compute capability", f"{capability[0]}.{capability[1]}"
    numbers = [(word.split("_")[0], word.split("_")[1].rstrip("af")) for word in built]
    found = [(kind, (int(number[:-1]), int(number[-1]))) for kind, number in numbers]
    same = any(kind == "sm" and one[0] == capability[0] and one[1] <= capability[1] for kind, one in found)
    later = any(kind == "compute" and one <= capability for kind, one in found)
    if not same and not later:
        return Finding(name, "fails", f"{text}; this torch has code for {', '.join(built)}", "install a torch that is "
                       "built for this GPU", "remark")  # fmt: skip
    if capability < AMPERE:
        return Finding(name, "remark", f"{text}, below {AMPERE[0]}.{AMPERE[1]}: no kernels of this package, bf16 is "
                       "slow", "engine.dtype=fp32, or a GPU from A100 on", "remark")  # fmt: skip
    return fine(name, text, "remark")


def driver(asked: Asked) -> Iterator[Finding]:
    """Whether the driver knows the CUDA that torch is built for."""
    import torch

    newest = driver_cuda()
    if newest is not None:
        yield driver_fits(newest, torch.version.cuda, DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else "")


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver knows, (13, 0); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_fits(newest: tuple[int, int], built: str | None, described: str = "") -> Finding:
    """newest: CUDA that the driver knows; built: torch's. Within a major version every driver runs every build."""
    version = next((word for word in described.split() if word[:1].isdigit() and "." in word), "")
    text = f"{version + ', ' if version else ''}CUDA {newest[0]}.{newest[1]}; torch is built for {built or 'CPU'}"
    if built is not None and int(built.split(".")[0]) > newest[0]:
        return Finding("driver", "fails", text, f"a newer driver, or a torch built for CUDA {newest[0]}", "remark")
    return fine("driver", text, "remark")


def dali_build(asked: Asked) -> Iterator[Finding]:
    """Whether DALI is built for torch's CUDA, where both are there."""
    import torch

    builds = dali_distributions()
    if builds and torch.version.cuda:
        yield dali_fits(builds, torch.version.cuda)


def dali_fits(builds: list[str], cuda: str) -> Finding:
    """builds: names of the installed DALI distributions; cuda: torch's."""
    major = cuda.split(".")[0]
    if len(builds) > 1:
        return Finding("DALI build", "remark", f"{', '.join(builds)}: files of one overwrite the other's",
                       f"pip uninstall all but {DALI}{major}0")  # fmt: skip
    if not builds[0].removeprefix(DALI).startswith(major):
        return Finding("DALI build", "remark", f"{builds[0]}; torch is built for CUDA {cuda}",
                       f"pip install {DALI}{major}0, so that one driver serves both")  # fmt: skip
    return fine("DALI build", f"{builds[0]}, as torch's CUDA {cuda}", "remark")


def processes(asked: Asked) -> Iterator[Finding]:
    """Whether there is a device for each process that the hostfile puts here."""
    import torch

    if asked.slots:
        yield places(asked.slots, torch.cuda.device_count(), len(os.sched_getaffinity(0)))


def places(slots: int, gpus: int, cores: int) -> Finding:
    """slots: processes on a host."""
    text = f"slots={slots}, {gpus} GPUs, {cores} cores"
    if gpus and slots > gpus:
        return Finding("slots", "fails", text, f"slots={gpus} in the hostfile")
    if gpus > slots:
        return Finding("slots", "remark", f"{text}: {gpus - slots} are left idle", f"slots={gpus} in the hostfile")
    if slots > cores:
        return Finding("slots", "remark", text, f"slots={cores} in the hostfile: processes share cores otherwise")
    return fine("slots", text)


PROBES = (gpus, driver, dali_build, processes)
