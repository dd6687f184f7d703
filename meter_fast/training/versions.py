"""What a run or a score was made with. Knows no runs."""

import platform
from importlib import metadata

import torch

import meter_fast


def versions() -> dict[str, str]:
    """By name: this package, torch, DeepSpeed, Python."""
    return {
        "meter_fast": meter_fast.__version__,
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "python": platform.python_version(),
    }
