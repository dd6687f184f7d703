"""Image-text matching: do a caption and a picture belong together? Knows batch and model, no other objective.

Source: METER, section 3.3 and `modules/objectives.py` (compute_itm_wpa). The batch says which pairs match; pictures
of pairs that do not are other rows of the same batch, or pictures drawn for the purpose. Exact saving: only the two
[CLS] rows of the last fusion layer are computed. Shape letters: B pairs, L text tokens, F false pictures, D width.
"""

import torch
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.losses import classified
from meter_fast.objectives.reading import Reading

HEAD = "itm_head"


def pictures(batch: PretrainBatch) -> Tensor | None:
    """[F,3,H,W] that only this objective looks at."""
    return batch.false_images


def reading(batch: PretrainBatch, first: int) -> Reading:
    """The whole captions, each with its own or a false picture, of which `first` is the row of the first."""
    own, places = len(batch), batch.itm_images
    places = places if first == own else torch.where(places < own, places, places + (first - own))
    return Reading(batch.text_ids, batch.text_mask, Part(Need.CLS, own, places), batch.text_rows)


def count(batch: PretrainBatch) -> int:
    """Pairs B."""
    return len(batch)


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the pairs / total, float32 scalar; pairs told rightly, int64 scalar."""
    return classified(model.itm_head(fused.cls), batch.itm_labels, total)
