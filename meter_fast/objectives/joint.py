"""Several objectives on one micro-batch, sharing what they can. Knows the objectives; knows nothing of steps, ranks or
optimizers.

Each picture is encoded once however many objectives read it; the texts of all objectives, masked and whole, go through
the text encoder and the fusion layers together. Outputs, losses and gradients are those of separate passes (dropout
off).

An objective is a module of five names: HEAD, the part of the model that it needs; `pictures`, what it looks at besides
the batch's own; `reading`, what it asks of the encoders and the fusion; `count`, what its loss is a mean over; `loss`.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.data.batch import Batch
from meter_fast.models.meter import Meter
from meter_fast.models.packing import Packing
from meter_fast.objectives import (
    caption,
    itm,
    mim_codes,
    mim_in_batch,
    mlm,
    nlvr2,
    reconstruction,
    retrieval,
    snli_ve,
    span_denoising,
    vqa,
)
from meter_fast.objectives.losses import Losses
from meter_fast.objectives.reading import Reading, fuse_readings

OBJECTIVES: dict[str, ModuleType] = {
    "mlm": mlm,
    "itm": itm,
    "mim_in_batch": mim_in_batch,
    "mim_codes": mim_codes,
    "span_denoising": span_denoising,
    "caption": caption,
    "vqa": vqa,
    "nlvr2": nlvr2,
    "snli_ve": snli_ve,
    "retrieval": retrieval,
}
SETTINGS = {  # that give a model the head
    "mlm_head": "mlm_head=true",
    "itm_head": "itm_head=true",
    "mim_in_batch_head": "mim_in_batch_head=true",
    "mim_codes_head": "mim_codes_head=NUMBER",
    "lm_head": "decoder.layers=3",
    "vqa_head": "vqa_answers=NUMBER",
    "nlvr2_head": "nlvr2_head=true",
    "snli_head": "snli_head=true",
    "rank_head": "rank_head=true",
}


class JointLoss(nn.Module):
    """The module that the engine trains. Raises ValueError for no objective, an unknown one, or one without a head."""

    def __init__(self, model: Meter, objectives: Sequence[str] = ("mlm", "itm")) -> None:
        super().__init__()
        for name in objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives.names has {name!r}: known are {', '.join(OBJECTIVES)}")
            if getattr(model, OBJECTIVES[name].HEAD) is None:
                setting = SETTINGS[OBJECTIVES[name].HEAD]
                raise ValueError(f"objective {name!r} needs a head that the model lacks: set model.{setting}")
        if not objectives or len(set(objectives)) != len(objectives):
            raise ValueError(f"objectives.names={tuple(objectives)}: name at least one objective, each once")
        self.model = model
        self.objectives = tuple(objectives)

    def forward(self, batch: Batch, totals: Mapping[str, float] | None = None) -> Losses:
        """Losses of a micro-batch on the model's device and dtype.

        totals: by objective, what summed losses are divided by: this micro-batch's share of the step's `count`, i.e.
        that of the whole step / (accumulation * ranks), so that the mean over micro-batches and ranks is the mean over
        all that the step holds. Without it, means are over the micro-batch itself.
        """
        counts = counts_of(self.objectives, [batch])
        totals = shares(counts, 1) if totals is None else totals
        pictures, readings = [batch.images], []
        for name in self.objectives:
            own = OBJECTIVES[name].pictures(batch)
            readings.append(OBJECTIVES[name].reading(batch, sum(map(len, pictures))))
            if own is not None:
                pictures.append(own)
        image = self.model.encode_image(torch.cat(pictures) if len(pictures) > 1 else batch.images)
        ids, mask = self._texts(readings)
        text, packings = self._encode_text(ids, mask, readings)
        fused = fuse_readings(self.model, text, image, mask, readings, packings)
        losses, metrics = {}, {}
        for name, rows in zip(self.objectives, fused, strict=True):
            losses[name], correct = OBJECTIVES[name].loss(self.model, rows, batch, totals[name])
            metrics[name] = (correct, correct.new_full((), counts[name]))
        total = torch.stack(list(losses.values())).sum()
        return Losses(total, {name: value.detach() for name, value in losses.items()}, metrics)

    def _texts(self, readings: Sequence[Reading]) -> tuple[Tensor, Tensor]:
        """ids and mask of all objectives, one after the other, as long as the longest."""
        length, pad_id = max(reading.ids.shape[1] for reading in readings), self.model.config.text.pad_id
        ids = [F.pad(r.ids, (0, length - r.ids.shape[1]), value=pad_id) for r in readings]
        mask = [F.pad(r.mask, (0, length - r.mask.shape[1]), value=False) for r in readings]
        return torch.cat(ids), torch.cat(mask)

    def _encode_text(
        self, ids: Tensor, mask: Tensor, readings: Sequence[Reading]
    ) -> tuple[Tensor, tuple[Packing, ...] | None]:
        """Encoded texts, and where packed ones lie."""
        if self.model.kernels.text == "padded":
            return self.model.encode_text(ids, mask), None
        packings: dict[int, Packing] = {}  # by mask: objectives that read the same texts share one
        for part, reading in zip(mask.split([len(r.ids) for r in readings]), readings, strict=True):
            if id(reading.mask) not in packings:
                known = reading.rows if reading.ids.shape[1] == mask.shape[1] else None
                packings[id(reading.mask)] = Packing.of(part, known)
        joined = tuple(packings[id(reading.mask)] for reading in readings)
        return self.model.encode_text(ids, mask, Packing.join(joined)), joined


def counts_of(objectives: Sequence[str], batches: Sequence[Batch]) -> dict[str, int]:
    """What each objective's loss is a mean over, in these micro-batches together."""
    counted = {**OBJECTIVES, reconstruction.NAME: reconstruction}  # the latter is no objective of a Meter
    return {name: sum(map(counted[name].count, batches)) for name in objectives}


def shares(counts: Mapping[str, float], micro_batches: int) -> dict[str, float]:
    """The `totals` of each of the micro-batches, over all ranks, of a step that holds `counts`; 1 where it holds
    nothing."""
    return {name: max(1.0, count) / micro_batches for name, count in counts.items()}
