"""Visual entailment: does a picture contradict a hypothesis, leave it open or entail it? Knows batch and model, no
other objective.

Source: METER, section 4.1 and `modules/objectives.py` (compute_snli): cross-entropy over three classes; the premise of
SNLI is not read, the picture stands for it. Exact savings: a picture is encoded once however many hypotheses are about
it, and only the two [CLS] rows of the last fusion layer are computed. Shape letters: B hypotheses, N pictures, L text
tokens.
"""

from torch import Tensor

from meter_fast.data.batch import StatementBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.losses import classified
from meter_fast.objectives.reading import Reading

HEAD = "snli_head"


def pictures(batch: StatementBatch) -> Tensor | None:
    """The hypotheses' own pictures are enough."""
    return None


def reading(batch: StatementBatch, first: int) -> Reading:
    """The hypotheses, each with its picture."""
    part = Part(Need.CLS, len(batch), batch.image_rows.squeeze(1))
    return Reading(batch.text_ids, batch.text_mask, part, batch.text_rows)


def count(batch: StatementBatch) -> int:
    """Hypotheses B."""
    return len(batch)


def loss(model: Meter, fused: Fused, batch: StatementBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; hypotheses told rightly, int64 scalar."""
    return classified(model.snli_head(fused.cls), batch.labels, total)
