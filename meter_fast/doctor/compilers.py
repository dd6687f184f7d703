"""What compiles while a run starts: Triton's launchers, torch.compile, DeepSpeed's operators. Knows which of them this
run would need; what it would not need is a remark at most."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from meter_fast.doctor.disks import existing
from meter_fast.doctor.finding import Asked, Finding, capped, fine
from meter_fast.recipes import resolve

SECONDS = 60
UNUSED = "nothing that this run does needs it"


def c_compiler(asked: Asked) -> Iterator[Finding]:
    """The one that Triton calls, tried on what Triton compiles: a module of Python."""
    needed = _triton(asked)
    chosen = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")  # as Triton chooses
    remedy = "apt install gcc (or name one in CC); kernels.*=reference does without"
    if not chosen or not shutil.which(chosen):
        text = f"CC={chosen} is not there" if chosen else "neither gcc nor clang is on PATH"
        yield _missing("C compiler", text, remedy, needed)
        return
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        yield _missing("C compiler", f"{chosen}, but there is no Python.h", "apt install python3-dev", needed)
        return
    said = _compile([chosen, f"-I{sysconfig.get_paths()['include']}"], ".c", "#include <Python.h>\n")
    if said:
        yield _missing("C compiler", f"{chosen} does not compile: {said}", remedy, needed)
    else:
        yield fine("C compiler", chosen)


def cpp_compiler(asked: Asked) -> Iterator[Finding]:
    """For torch.compile on a CPU, and for operators of DeepSpeed that a file of the user's may ask for."""
    needed = "engine.compile=true" if resolve(asked.command).engine.compile else ""
    chosen = os.environ.get("CXX") or "g++"
    if not shutil.which(chosen):
        yield _missing("C++ compiler", f"{chosen} is not on PATH", "apt install g++ (or name one in CXX)", needed)
        return
    said = _compile([chosen, "-std=c++17"], ".cpp", "#include <vector>\nstd::vector<int> made() { return {1}; }\n")
    if said:
        yield _missing("C++ compiler", f"{chosen} does not compile: {said}", "apt install g++", needed)
    else:
        yield fine("C++ compiler", chosen)


def _compile(command: list[str], ending: str, text: str) -> str:
    """ "" if it compiles, else what the compiler says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"trial{ending}")
        source.write_text(text)
        done = subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", f"{source}.so"], capture_output=True,
                              text=True, timeout=SECONDS)  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[0]


def cuda(asked: Asked) -> Iterator[Finding]:
    """nvcc and CUDA_HOME: DeepSpeed's own CUDA operators would be compiled with them."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    home = f"CUDA_HOME={CUDA_HOME}" if CUDA_HOME else "no CUDA_HOME"
    if not nvcc:
        yield fine("nvcc", f"not there, {home}; {UNUSED}")
        return
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=SECONDS)
    release = next((line.split("release ")[1].split(",")[0] for line in done.stdout.splitlines() if "release " in line),
                   "of unknown version")  # fmt: skip
    yield nvcc_fits(release, torch.version.cuda, f"{nvcc} {release}, {home}")


def nvcc_fits(release: str, cuda: str, text: str) -> Finding:
    """release: of nvcc; cuda: torch's. DeepSpeed refuses to compile where the major versions differ."""
    if release.split(".")[0] != cuda.split(".")[0]:
        return Finding("nvcc", "remark", f"{text}; torch is built for CUDA {cuda}: DeepSpeed would not use it; "
                       f"{UNUSED}", f"a toolkit of CUDA {cuda}, if your DeepSpeed file asks for operators")  # fmt: skip
    return fine("nvcc", text)


def ninja(asked: Asked) -> Iterator[Finding]:
    """The builder of torch's extensions."""
    found = shutil.which("ninja")
    if found:
        yield fine("ninja", found)
    else:
        yield _missing("ninja", "not on PATH", "pip install ninja, and put the environment's bin on PATH", "")


def offload(asked: Asked) -> Iterator[Finding]:
    """engine.offload=cpu: the optimizer is this package's, in torch; DeepSpeed takes it only if it is told to."""
    config = resolve(asked.command)
    if config.engine.offload != "cpu":
        return
    from meter_fast.training.engine import deepspeed_config

    settings = deepspeed_config(config, asked.world or asked.processes)
    if settings.get("zero_force_ds_cpu_optimizer", True):
        yield Finding("offload", "fails", f"{config.engine.ds_config} lets DeepSpeed insist on its CPUAdam",
                      'add "zero_force_ds_cpu_optimizer": false')  # fmt: skip
    else:
        yield fine("offload", "the optimizer is torch code on the host: no CPUAdam is compiled")


def caches(asked: Asked) -> Iterator[Finding]:
    """Whether what is compiled can be kept."""
    home = Path.home()
    places = {
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(home / ".triton"),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(home / ".cache" / "torch_extensions"),
    }
    for name, place in places.items():
        folder = existing(place)
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            yield fine(name, place)
        else:
            needed = _triton(asked) if name == "TRITON_CACHE_DIR" else ""
            yield _missing(name, f"{place}: {folder} cannot be written", f"name a folder in {name}", needed)


def _triton(asked: Asked) -> str:
    """Why Triton will compile in this run; "" if it will not."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return ""
    from meter_fast.models.meter import settle

    config = resolve(asked.command)
    chosen = settle(config.kernels, config.model)
    wanted = "triton" in (chosen.cross_attention, chosen.mlm_loss, chosen.residual_norm, chosen.gelu)
    return "Triton compiles its kernels with it" if wanted else ""


def _missing(name: str, text: str, remedy: str, needed: str) -> Finding:
    """needed: why this run cannot do without, or ""."""
    found = Finding(name, "fails", f"{text}; {needed or UNUSED}", remedy)
    return found if needed else capped(found, "remark")


PROBES = (c_compiler, cpp_compiler, cuda, ninja, offload, caches)
