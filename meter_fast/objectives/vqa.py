"""Visual question answering as classification over the known answers. Knows batch and model, no other objective.

Source: METER, section 4.1 and `modules/objectives.py` (compute_vqa): binary cross-entropy of every answer's logit with
its soft score, mean over questions and answers, times the number of answers; that is the sum over answers, mean over
questions. Exact savings: a picture that several questions ask about is encoded once, and only the two [CLS] rows of
the last fusion layer are computed. Shape letters: B questions, N pictures, L text tokens, A answers.
"""

import torch.nn.functional as F
from torch import Tensor

from meter_fast.data.batch import VqaBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.reading import Reading

HEAD = "vqa_head"


def pictures(batch: VqaBatch) -> Tensor | None:
    """The questions' own pictures are enough."""
    return None


def reading(batch: VqaBatch, first: int) -> Reading:
    """The questions, each with the picture that it asks about."""
    return Reading(batch.text_ids, batch.text_mask, Part(Need.CLS, len(batch), batch.image_rows), batch.text_rows)


def count(batch: VqaBatch) -> int:
    """Questions B."""
    return len(batch)


def loss(model: Meter, fused: Fused, batch: VqaBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed binary cross-entropy / total, float32 scalar; summed scores of the chosen answers, float32 scalar.

    The second over B is the VQA score. Raises ValueError where targets and head differ in the number of answers.
    """
    logits = model.vqa_head(fused.cls).float()
    if logits.shape != batch.targets.shape:
        raise ValueError(
            f"the batch scores {batch.targets.shape[1]} answers, the model {logits.shape[1]}: set model.vqa_answers="
            f"{batch.targets.shape[1]}"
        )
    value = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum") / total
    return value, answer_scores(logits.detach(), batch.targets).sum()


def answer_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """The score of each question's first choice: [B,A], [B,A] -> [B] float32 (METER, `gadgets/my_metrics.py`)."""
    return targets.gather(1, logits.argmax(dim=-1, keepdim=True)).squeeze(1)
