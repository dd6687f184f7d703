"""What a micro-batch gives the engine. Knows tensors only."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """loss: float32 scalar to run backward on, the plain sum of `parts` (detached, by objective).

    metrics: by name, (how many were right, of how many), scalars on the device; what is right in part counts in part.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]]
