"""What `deepspeed --hostfile` needs on the machine that it is started on, and what it would send to the hosts.

Knows DeepSpeed's launcher, whose reader and whose list of variables it asks.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meter_fast.doctor.finding import Asked, Finding, fine


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


STAYS = ("GLOO_", "NCCL_", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "TRITON_", "CUDA_HOME",
         "CUDA_VISIBLE_DEVICES")  # fmt: skip


PROBES = (commands, environment)
