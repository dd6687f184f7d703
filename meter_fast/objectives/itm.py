"""Image-text matching: do a caption and a picture belong together? Knows batch and model, no other objective.

Source: METER, section 3.3 and `modules/objectives.py` (compute_itm_wpa). The batch says which pairs match; pictures
of pairs that do not are other rows of the same batch, or pictures drawn for the purpose. Exact saving: only the two
[CLS] rows of the last fusion layer are computed. Shape letters: B pairs, L text tokens, D fusion width.
"""

import torch.nn.functional as F
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part

HEAD = "itm_head"


def texts(batch: PretrainBatch) -> Tensor:
    """The ids that the text encoder reads, int64 [B,L]: nothing is masked."""
    return batch.text_ids


def part(batch: PretrainBatch) -> Part:
    """Which pictures go with the texts, and the rows that are read: the two [CLS] rows."""
    return Part(Need.CLS, len(batch), batch.itm_images)


def loss(model: Meter, fused: Fused, batch: PretrainBatch, masked_total: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy over the pairs, float32 scalar; pairs told rightly; pairs B (int64 scalars)."""
    logits = model.itm_head(fused.cls)
    value = F.cross_entropy(logits.float(), batch.itm_labels)
    correct = (logits.detach().argmax(dim=-1) == batch.itm_labels).sum()
    return value, correct, correct.new_full((), len(batch))
