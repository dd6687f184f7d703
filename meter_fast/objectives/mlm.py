"""Masked language modelling: fill in a caption's masked tokens, seeing the picture. Knows batch and model, no other
objective.

Source: METER, section 3.3 and `modules/objectives.py` (compute_mlm). Exact saving: the vocabulary is scored on masked
rows only, not on all B*L. Shape letters: B pairs, L text tokens, M masked rows, D fusion width.
"""

from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part

HEAD = "mlm_head"


def texts(batch: PretrainBatch) -> Tensor:
    """The ids that the text encoder reads, int64 [B,L]."""
    return batch.masked_ids


def part(batch: PretrainBatch) -> Part:
    """Which pictures go with the texts, and the rows that are read: every text row (any of them may be masked)."""
    return Part(Need.TEXT, len(batch))


def loss(model: Meter, fused: Fused, batch: PretrainBatch, masked_total: float) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy / masked_total, float32 scalar; rows filled correctly; rows M (int64 scalars)."""
    rows = fused.text.flatten(0, 1).index_select(0, batch.masked_rows)
    total, correct = model.mlm_head(rows, batch.masked_labels)
    return (total / masked_total, correct, correct.new_full((), batch.masked_labels.numel()))
