"""MLM and ITM on one micro-batch, sharing what they can. Knows the objectives; knows nothing of steps, ranks or
optimizers.

Each picture is encoded once however many objectives read it; the captions of all objectives, masked and whole, go
through the text encoder and the fusion layers together. Outputs, losses and gradients are those of separate passes
(dropout off).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Meter
from meter_fast.models.packing import Packing
from meter_fast.objectives import itm, mlm

OBJECTIVES: dict[str, ModuleType] = {"mlm": mlm, "itm": itm}


@dataclass(frozen=True)
class Totals:
    """What means are taken over.

    masked: masked tokens of this micro-batch's share of the step, i.e. those of the whole step / (accumulation *
    ranks): the mean over micro-batches and ranks is then the mean over all masked tokens of the step. It must be
    above 0.
    """

    masked: float

    def __post_init__(self) -> None:
        if not self.masked > 0:
            raise ValueError(
                f"Totals.masked={self.masked}: the share of masked tokens must be above 0 (take 1 if none is masked)"
            )


@dataclass(frozen=True)
class Losses:
    """loss: float32 scalar to run backward on, the plain sum of `parts` (detached, by objective).

    metrics: by name, (how many were right, of how many), int64 scalars on the device.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]]


class Pretraining(nn.Module):
    """The module that the engine trains. Raises ValueError for no objective, an unknown one, or one without a head."""

    def __init__(self, model: Meter, objectives: Sequence[str] = ("mlm", "itm")) -> None:
        super().__init__()
        for name in objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives.names has {name!r}: known are {', '.join(OBJECTIVES)}")
            if getattr(model, OBJECTIVES[name].HEAD) is None:
                raise ValueError(
                    f"objective {name!r} needs a head that the model lacks: set model.{OBJECTIVES[name].HEAD}=true"
                )
        if not objectives or len(set(objectives)) != len(objectives):
            raise ValueError(f"objectives.names={tuple(objectives)}: name at least one objective, each once")
        self.model = model
        self.objectives = tuple(objectives)

    def forward(self, batch: PretrainBatch, totals: Totals | None = None) -> Losses:
        """Losses of a micro-batch on the model's device and dtype. Without `totals`, means are over the micro-batch
        itself."""
        totals = totals or Totals(max(1, batch.masked_labels.numel()))
        chosen = [OBJECTIVES[name] for name in self.objectives]
        parts = tuple(objective.part(batch) for objective in chosen)
        images = batch.images
        if batch.false_images is not None and any(part.images is not None for part in parts):
            images = torch.cat([images, batch.false_images])
        ids = torch.cat([objective.texts(batch) for objective in chosen])
        mask = torch.cat([batch.text_mask] * len(chosen))
        text, packings = self._encode_text(ids, mask, batch, len(chosen))
        fused = self.model.fuse_parts(text, self.model.encode_image(images), mask, parts, packings=packings)
        losses, metrics = {}, {}
        for name, objective, rows in zip(self.objectives, chosen, fused, strict=True):
            losses[name], correct, count = objective.loss(self.model, rows, batch, totals.masked)
            metrics[name] = (correct, count)
        total = torch.stack(list(losses.values())).sum()
        return Losses(total, {name: value.detach() for name, value in losses.items()}, metrics)

    def _encode_text(
        self, ids: Tensor, mask: Tensor, batch: PretrainBatch, times: int
    ) -> tuple[Tensor, tuple[Packing, ...] | None]:
        """Encoded texts, and where packed ones lie, which is the same for every objective."""
        if self.model.kernels.text == "padded":
            return self.model.encode_text(ids, mask), None
        packings = (Packing.of(batch.text_mask, batch.text_rows),) * times
        return self.model.encode_text(ids, mask, Packing.join(packings)), packings
