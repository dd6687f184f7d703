"""What every operator needs to launch its kernel: which architecture it runs on, and whether Triton interprets.

A launcher (the function that picks a tile configuration and launches) looks at shapes and at `Arch`, never at a device,
so that the same launcher can be compiled ahead of time for a GPU that is not there.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Arch:
    """Compute capability as nvcc writes it: 80 is an A100, 90 an H100."""

    capability: int


INTERPRETER = Arch(0)
_INTERPRETED = triton.knobs.runtime.interpret


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported: kernels then run on a CPU, slowly."""
    return _INTERPRETED


def arch_of(x: Tensor) -> Arch:
    """The architecture that the tensor lives on; for a CPU, what the interpreter counts as."""
    if x.device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(x.device)
    return Arch(10 * major + minor)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where the tensor lives; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
