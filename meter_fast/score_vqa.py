"""The VQA score of a model on a split of questions, in all and by kind of answer, beside that with other pictures.

Knows models, loaders of questions and the label space. Knows nothing of runs or training.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from meter_fast.data.answers import Answers
from meter_fast.data.batch import VqaBatch
from meter_fast.exchanged import other_pictures
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.objectives.vqa import answer_scores

NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
NO_ANSWER = "no known answer"


def kind_of(answer: str | None) -> str:
    """ "yes/no", "number" or "other", as VQAv2 parts its questions. Told from the answer, as tables hold no kind."""
    if answer in ("yes", "no"):
        return "yes/no"
    if answer is not None and (answer.isdigit() or answer in NUMBER_WORDS):
        return "number"
    return "other"


@torch.inference_mode()
def score_questions(
    model: Meter, batches: Iterable[VqaBatch], answers: Answers, device: torch.device | str
) -> dict[str, dict[str, float]]:
    """{"all": {"score", "exchanged", "count"}, kind: {...}} over the questions of all batches, on one process.

    score: mean soft score of the model's first choice (the VQA accuracy of METER). exchanged: the same where each
    question is asked about another picture of its batch; over those batches alone that hold two pictures or more, and
    None where there is none. A question without known answer scores 0. Raises ValueError for no batch, or where no
    question has an answer.
    """
    was_training = model.training
    model.eval()
    own, other, kinds = [], [], []
    try:
        for batch in batches:
            scores = _scores(model, batch.to(device))
            own.append(scores[0].cpu())
            other.append(scores[1].cpu())
            kinds += _kinds(batch.targets, answers)
    finally:
        model.train(was_training)
    if not own:
        raise ValueError("evaluation: the split gave no batch")
    if all(kind == NO_ANSWER for kind in kinds):
        raise ValueError("evaluation: no question of this split has an answer (the test split of VQAv2 has none): "
                         "choose another, for example data.val_sources=arrow:vqav2_val")  # fmt: skip
    right, exchanged = torch.cat(own), torch.cat(other)
    result = {"all": _means(right, exchanged, torch.ones_like(right, dtype=torch.bool))}
    for kind in sorted(set(kinds)):
        result[kind] = _means(right, exchanged, torch.tensor([one == kind for one in kinds]))
    return result


def _scores(model: Meter, batch: VqaBatch) -> tuple[Tensor, Tensor]:
    """Soft score of each question's first choice with its own picture and with another, [B] and [B] float32; NaN where
    the batch has no other."""
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.text_ids, batch.text_mask)
    found = []
    others, there = other_pictures(batch.image_rows[:, None])
    for rows in (batch.image_rows, others.squeeze(1)):
        (fused,) = model.fuse_parts(text, image, batch.text_mask, (Part(Need.CLS, len(batch), rows),))
        found.append(answer_scores(model.vqa_head(fused.cls), batch.targets))
    return found[0], found[1].masked_fill(~there, float("nan"))


def _kinds(targets: Tensor, answers: Answers) -> list[str]:
    """The kind of each question's best answer."""
    best, labels = targets.max(dim=1)
    pairs = zip(best.tolist(), labels.tolist(), strict=True)
    return [kind_of(answers.names[label]) if score > 0 else NO_ANSWER for score, label in pairs]


def _means(right: Tensor, exchanged: Tensor, chosen: Tensor) -> dict[str, float]:
    seen = exchanged[chosen].double()
    other = seen[~seen.isnan()]
    return {
        "score": right[chosen].double().mean().item(),
        "exchanged": other.mean().item() if len(other) else None,
        "count": int(chosen.sum()),
    }
