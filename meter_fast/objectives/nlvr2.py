"""Reasoning over two pictures: is a statement about them true? Knows batch and model, no other objective.

Source: METER, section 4.1 and `modules/objectives.py` (compute_nlvr2): two passes over the same statement, the left
picture with row 1 of the token types, the right one with row 2; both cls side by side go into one head, cross-entropy.
Exact savings: the statement is encoded once, both passes go through the layers together, a picture is encoded once
however many statements are about it, and only the [CLS] rows of the last fusion layer are computed. With dropout on,
both passes share the mask of what is computed once. Shape letters: B statements, N pictures, L text tokens.
"""

from torch import Tensor

from meter_fast.data.batch import StatementBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.losses import classified
from meter_fast.objectives.reading import Reading

HEAD = "nlvr2_head"


def pictures(batch: StatementBatch) -> Tensor | None:
    """The statements' own pictures are enough."""
    return None


def reading(batch: StatementBatch, first: int) -> Reading:
    """The statements, each with its left and with its right picture."""
    left, right = (
        Part(Need.CLS, len(batch), rows, image_type=number)
        for number, rows in enumerate(batch.image_rows.unbind(1), start=1)
    )
    return Reading(batch.text_ids, batch.text_mask, left, batch.text_rows, also=(right,))


def count(batch: StatementBatch) -> int:
    """Statements B."""
    return len(batch)


def loss(model: Meter, fused: Fused, batch: StatementBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; statements judged rightly, int64 scalar."""
    return classified(model.nlvr2_head(fused.cls), batch.labels, total)
