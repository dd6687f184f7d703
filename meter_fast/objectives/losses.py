"""What a micro-batch gives the engine. Knows tensors only."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """loss: float32 scalar to run backward on, the plain sum of `parts` (detached, by objective).

    metrics: by name, (how many were right, of how many), scalars on the device; what is right in part counts in part.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]]


def classified(logits: Tensor, labels: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """logits [B,C], labels [B] int64 -> summed cross-entropy / total, float32 scalar; how many have the largest logit
    at their label, int64 scalar."""
    value = F.cross_entropy(logits.float(), labels, reduction="sum") / total
    return value, (logits.detach().argmax(dim=-1) == labels).sum()
