"""Retrieval: which of several texts belongs to a picture? Knows batch and model, no other objective.

Source: METER, section 4.2 and `modules/objectives.py` (compute_irtr): the true text and 15 false ones of the data set
are scored by one linear layer, cross-entropy to the true one. Exact savings: a picture is encoded once for all its
texts, where the published code repeats it 16 times before the vision encoder, and so is what depends on it alone in the
fusion; only the two [CLS] rows of the last fusion layer are computed. Shape letters: B pairs, F false texts of each,
L text tokens.

The layer starts as row 1 of the ITM head, which the published run freezes (`modules/meter_module.py`) while it adds the
ITM loss. That is no waste: the loss still trains all that is below the head, and it alone compares pictures of one
text, which the scores of one picture's texts say nothing about. So fine-tuning is on both; ITM then adds one pair to
the sixteen, and no picture if its false ones come from the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.reading import Reading

HEAD = "rank_head"


def pictures(batch: PretrainBatch) -> Tensor | None:
    """The pairs' own pictures are enough."""
    return None


def reading(batch: PretrainBatch, first: int) -> Reading:
    """All true texts, then the false ones of each pair, with the pair's own picture.

    Raises ValueError for a batch without false texts.
    """
    texts = batch.ranked
    if texts is None:
        raise ValueError("the batch has no false texts, which objective 'retrieval' ranks below the true one")
    own = torch.arange(len(batch), device=texts.ids.device)
    false = len(texts.ids) // len(batch) - 1
    images = torch.cat([own, own.repeat_interleave(false)])
    return Reading(texts.ids, texts.mask, Part(Need.CLS, len(images), images), texts.text_rows)


def count(batch: PretrainBatch) -> int:
    """Pairs B."""
    return len(batch)


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the pairs / total, float32 scalar; pairs whose true text is on top, int64 scalar."""
    scores = scores_of(model, fused, len(batch))
    value = F.cross_entropy(scores, scores.new_zeros(len(batch), dtype=torch.int64), reduction="sum") / total
    return value, (scores.detach().argmax(dim=-1) == 0).sum()


def scores_of(model: Meter, fused: Fused, pairs: int) -> Tensor:
    """[B,F+1] float32 or wider: of the true text, then of the false ones in order."""
    scores = model.rank_head(fused.cls).squeeze(-1)
    return torch.cat([scores[:pairs, None], scores[pairs:].view(pairs, -1)], dim=1)
