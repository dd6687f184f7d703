"""The command that trains, in one process as it is, in several through DeepSpeed's launcher; and who starts commands.

Knows commands, devices, ports and requests to stop. Knows nothing of what is trained or of what its end means.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

from meter_fast.config import ConfigError
from meter_fast.training.interruption import SIGNALS
from meter_fast.training.ports import free_port


class Starter:
    """Starts one process after another, and passes a request to stop on to the one that runs. A context manager: it
    listens inside. reason: the signal that asked, or ""."""

    def __init__(self) -> None:
        self.reason = ""
        self._process: subprocess.Popen | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, words: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.Popen:
        """The process of a command. options: of Popen."""
        self._process = subprocess.Popen(words, env=environment, **options)
        if self.reason:  # asked in the moment before there was a process to tell
            self._process.send_signal(signal.SIGTERM)
        return self._process

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


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
