"""What `deepspeed --hostfile` needs on the machine that it is started on, and what it would send to the hosts.

Knows DeepSpeed's launcher, whose reader and whose list of variables it asks.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meter_fast.doctor.finding import Asked, Finding, fine, unknown


def commands(asked: Asked) -> Iterator[Finding]:
    """ssh, pdsh and deepspeed itself."""
    needs = {
        "ssh": ("apt install openssh-client", "hosts are reached with it"),
        "pdsh": (
            "apt install pdsh; or deepspeed --no_ssh --node_rank I on every host",
            "DeepSpeed starts hosts with it",
        ),
        "deepspeed": ("pip install deepspeed, and put the environment's bin on PATH", "it starts the processes"),
    }
    for name, (remedy, purpose) in needs.items():
        beside = Path(sys.executable).parent / name
        found = shutil.which(name) or (str(beside) if beside.is_file() else None)
        if found:
            yield fine(name, found)
        elif name == "pdsh" and asked.hosts == 1:
            yield fine(name, "not on PATH; not needed for one host")
        else:
            yield Finding(name, "fails", f"not on PATH; {purpose}", remedy)


def environment(asked: Asked) -> Iterator[Finding | tuple[str, Any]]:
    """The variables that the processes on the hosts get; a fact for those who ask the hosts."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher.runner import DEEPSPEED_ENVIRONMENT_NAME, DEEPSPEED_ENVIRONMENT_PATHS, EXPORT_ENVS

    exported = (*EXPORT_ENVS, *get_accelerator().export_envs())
    sent = {name: value for name, value in os.environ.items() if name.startswith(exported)}
    for folder in DEEPSPEED_ENVIRONMENT_PATHS:
        path = os.path.join(folder, DEEPSPEED_ENVIRONMENT_NAME)
        if not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                name, separator, value = line.strip().partition("=")
                if not separator:
                    text = f"{path}, line {number}: {line.strip()!r} is not NAME=VALUE"
                    yield Finding(".deepspeed_env", "fails", text, "remove or correct the line; it has no comments")
                    continue
                sent[name] = value
    yield "environment", sent
    yield fine("variables that travel", ", ".join(sorted(sent)) or "none")
    kept = sorted(name for name in os.environ if name.startswith(STAYS) and name not in sent)
    if kept:
        yield Finding("variables that stay", "remark", f"{', '.join(kept)}: set here, not sent to the hosts",
                      "NAME=VALUE lines in .deepspeed_env")  # fmt: skip


def keep_alive(asked: Asked) -> Iterator[Finding]:
    """Whether ssh notices that a host is gone: else deepspeed, whose ssh waits, does not end when the run does."""
    if asked.hosts < 2 or not shutil.which("ssh"):
        return
    words = ["ssh", *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), "-G", "any-host"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    if "serveraliveinterval" not in said:
        yield unknown("ssh keep-alive", done.stderr.strip() or "ssh -G does not tell")
        return
    every, times = int(said["serveraliveinterval"]), int(said["serveralivecountmax"])
    if every:
        yield fine("ssh keep-alive", f"a host that is gone is noticed after {every * times} s")
    else:
        yield Finding("ssh keep-alive", "remark", "ServerAliveInterval is 0: where a host or the link fails, the run "
                      "ends, but the deepspeed command does not", "ServerAliveInterval 15 and ServerAliveCountMax 4 in "
                      "~/.ssh/config")  # fmt: skip


SECONDS = 10
STAYS = ("GLOO_", "NCCL_", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "TRITON_", "CUDA_HOME",
         "CUDA_VISIBLE_DEVICES")  # fmt: skip


PROBES = (commands, environment, keep_alive)
