"""Span denoising: write what was hidden of a caption, seeing the picture. Knows batch and model, no other objective.

Source: METER, section 3.2 and table 7 (encoder-decoder); Raffel et al. 2020. What is hidden: `data/spans.py`.
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
    """The captions with sentinels in place of what is hidden."""
    return writing.reading(batch.span_denoising)


def count(batch: PretrainBatch) -> int:
    """Tokens to write M."""
    return batch.span_denoising.rows.numel()


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; tokens written correctly, int64 scalar."""
    return writing.loss(model, fused, batch.span_denoising, total)
