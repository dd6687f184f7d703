"""Captioning: write the whole caption from the picture alone. Knows batch and model, no other objective.

It is span denoising with everything hidden: the text that is read is one sentinel. Not an objective of METER's
pre-training; the encoder-decoders that its section 3.2 compares with (VL-T5, SimVLM) train on it.
"""

from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter
from meter_fast.objectives import writing
from meter_fast.objectives.reading import Reading

HEAD = "lm_head"


def pictures(batch: PretrainBatch) -> Tensor | None:
    """The captions' own pictures are enough."""
    return None


def reading(batch: PretrainBatch, first: int) -> Reading:
    """A sentinel with each picture."""
    return writing.reading(batch.caption)


def count(batch: PretrainBatch) -> int:
    """Tokens to write M."""
    return batch.caption.rows.numel()


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; tokens written correctly, int64 scalar."""
    return writing.loss(model, fused, batch.caption, total)
