"""Masked language modelling: fill in a caption's masked tokens, seeing the picture. Knows batch and model, no other
objective.

Source: METER, section 3.3 and `modules/objectives.py` (compute_mlm). Exact saving: the vocabulary is scored on masked
rows only, not on all B*L. Shape letters: B pairs, L text tokens, M masked rows, D fusion width.
"""

from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.reading import Reading

HEAD = "mlm_head"


def pictures(batch: PretrainBatch) -> Tensor | None:
    """The captions' own pictures are enough."""
    return None


def reading(batch: PretrainBatch, first: int) -> Reading:
    """The masked captions, each with its own picture; every text row, as any of them may be masked."""
    return Reading(batch.masked_ids, batch.text_mask, Part(Need.TEXT, len(batch)), batch.text_rows)


def count(batch: PretrainBatch) -> int:
    """Masked tokens M."""
    return batch.masked_labels.numel()


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; tokens filled correctly, int64 scalar."""
    rows = fused.text.flatten(0, 1).index_select(0, batch.masked_rows)
    summed, correct = model.mlm_head(rows, batch.masked_labels)
    return summed / total, correct
