"""Masked image modelling with discrete codes: which code does an image tokenizer give a hidden cell? Knows batch and
model, no other objective.

Source: METER, section 3.3 (masked patch classification with discrete codes; codes of a VQ-VAE, as in BEiT). The codes
are those of the whole pictures and come with the batch. Shape letters: B pairs, M hidden cells, D fusion width.
"""

from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter
from meter_fast.objectives.masked_pictures import count, hidden_rows, pictures, reading

__all__ = ["HEAD", "count", "loss", "pictures", "reading"]

HEAD = "mim_codes_head"


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the hidden cells / total, float32 scalar; codes told rightly, int64 scalar."""
    if batch.cell_codes is None:
        raise ValueError("the batch has no codes of its hidden cells: give its loader's CellMasking an image tokenizer")
    summed, correct = model.mim_codes_head(hidden_rows(model, fused, batch), batch.cell_codes)
    return summed / total, correct
