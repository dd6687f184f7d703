"""What one optimizer step gave, carried to the host without making it wait.

Knows scalars on a device and their names. Knows nothing of the engine or of where they are shown.

The values of a step are stacked into one tensor whose copy to the host begins at the end of the step and is read at the
next step's start. By then the device has long been past the losses: nothing stalls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meter_fast.objectives.joint import Losses


@dataclass(frozen=True)
class Numbers:
    """The host's view: sums over micro-batches. `bad`: micro-batches whose loss is not finite."""

    losses: dict[str, float]
    correct: dict[str, float]
    count: dict[str, float]
    grad_norm: float | None
    bad: list[int]


class StepRecord:
    """Collects the micro-batches of step `step` (from 0) for the objectives `names`."""

    def __init__(self, step: int, names: tuple[str, ...]) -> None:
        self.step = step
        self.names = names
        self.sample_ids: list[Tensor] = []
        self.rates: dict[str, float] = {}
        self.seconds: Sequence[float] = ()
        self._rows: list[Tensor] = []
        self._norm_known = False
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, losses: Losses, sample_ids: Tensor) -> None:
        """One micro-batch."""
        values = [losses.parts[name] for name in self.names]
        values += [part for name in self.names for part in losses.metrics[name]]
        self._rows.append(torch.stack([value.detach().double() for value in values]))
        self.sample_ids.append(sample_ids)

    def close(self, grad_norm: Tensor | float | None, rates: dict[str, float], seconds: Sequence[float]) -> None:
        """The step is done: begin the copy to the host. seconds: what it took this process, by phase."""
        self.rates, self.seconds = rates, seconds
        self._norm_known = grad_norm is not None
        table = torch.stack(self._rows)
        norm = torch.as_tensor(grad_norm if self._norm_known else 0.0, dtype=torch.float64, device=table.device)
        everything = torch.cat([norm.reshape(1), table.flatten()])
        if everything.is_cuda:
            self._host = torch.empty(everything.shape, dtype=everything.dtype, pin_memory=True)
            self._host.copy_(everything, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = everything

    def losses(self, micro_batch: int) -> dict[str, float]:
        """Each objective's loss of one micro-batch."""
        return dict(zip(self.names, self._table()[1][micro_batch]))

    def read(self) -> Numbers:
        """Wait for the copy and give the numbers."""
        norm, rows = self._table()
        sums = [math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for column in zip(*rows)]
        n = len(self.names)
        return Numbers(
            losses=dict(zip(self.names, sums[:n])),
            correct=dict(zip(self.names, sums[n::2])),
            count=dict(zip(self.names, sums[n + 1 :: 2])),
            grad_norm=norm if self._norm_known else None,
            bad=[i for i, row in enumerate(rows) if not all(map(math.isfinite, row[:n]))],
        )

    def _table(self) -> tuple[float, list[list[float]]]:
        """(gradient norm, one row a micro-batch: losses, then correct and count by objective)."""
        assert self._host is not None
        if self._copied is not None:
            self._copied.synchronize()
        norm, *flat = self._host.tolist()
        width = 3 * len(self.names)
        return norm, [flat[start : start + width] for start in range(0, len(flat), width)]
