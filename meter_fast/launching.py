"""The command that trains: in one process as it is, in several through DeepSpeed's launcher.

Knows commands, devices and ports. Knows nothing of what is trained or of how it ends.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from meter_fast.config import ConfigError
from meter_fast.training.ports import free_port


def training_command(
    arguments: Sequence[str], processes: int | None, hostfile: str
) -> tuple[list[str], dict[str, str]]:
    """(command line, environment) of a run. arguments: recipe and settings. processes: None is one for each GPU;
    hostfile: of DeepSpeed, or empty. Raises ConfigError where the launcher is missing."""
    gpus = _gpus()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not gpus and not hostfile:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    count = processes if processes is not None else max(1, gpus)
    if count == 1 and not hostfile:
        return [sys.executable, "-m", "meter_fast.cli", "train", *arguments], environment
    if not gpus and not hostfile:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    where = ["--hostfile", hostfile] if hostfile else ["--num_gpus", str(count)]
    port = ["--master_port", str(free_port())]
    words = [sys.executable, _launcher(), *where, *port, "--no_local_rank", "--module", "meter_fast.train"]
    return [*words, *arguments], environment


def _launcher() -> str:
    """The deepspeed script that belongs to this Python."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ConfigError("the command deepspeed is not on PATH: install DeepSpeed, or train in one process")
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
