"""The VQA score of a model on a split of questions, in all and by kind of answer, beside that with other pictures.

Knows models, loaders of questions and the label space. Knows nothing of runs or training.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class Asked(NamedTuple):
    """One question and what the model said. sample: its number in the split; label: the best of the answers that have a
    name, the best of all where none has one; score: soft score of the first choice of all; exchanged: the same with
    another picture, None where the batch has no other; kind: of its best answer."""

    sample: int
    question_id: int
    label: int
    score: float
    exchanged: float | None
    kind: str


def score_questions(
    model: Meter, batches: Iterable[VqaBatch], answers: Answers, device: torch.device | str
) -> dict[str, dict[str, float]]:
    """`summary` of `ask`."""
    return summary(ask(model, batches, device, answers))


@torch.inference_mode()
def ask(model: Meter, batches: Iterable[VqaBatch], device: torch.device | str, answers: Answers) -> list[Asked]:
    """Every question of the batches, on this process. The other picture of a question is another one of its batch."""
    was_training = model.training
    model.eval()
    unnamed = torch.tensor([name is None for name in answers.names])
    unnamed = (unnamed & ~unnamed.all()).to(device)
    asked: list[Asked] = []
    try:
        for batch in batches:
            labels, own, other = _scores(model, batch.to(device), unnamed)
            columns = (batch.sample_ids, batch.question_ids, labels, own, other)
            rows = zip(*(column.tolist() for column in columns), _kinds(batch.targets, answers), strict=True)
            asked += [Asked(*row[:4], None if math.isnan(row[4]) else row[4], row[5]) for row in rows]
    finally:
        model.train(was_training)
    return asked


def summary(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """{"all": {"score", "exchanged", "count"}, kind: {...}} over questions.

    score: mean soft score of the model's first choice (the VQA accuracy of METER). exchanged: the same where each
    question is asked about another picture; over those alone that have one, and None where there is none. A question
    without known answer scores 0. Raises ValueError for no question, or where none has an answer.
    """
    if not asked:
        raise ValueError("evaluation: the split gave no batch")
    if not answered(asked):
        raise ValueError("evaluation: no question of this split has an answer (the test split of VQAv2 has none): "
                         "choose another, for example data.val_sources=arrow:vqav2_val, or write the evaluation "
                         "server's file: --submission FILE.json")  # fmt: skip
    result = {"all": _means(asked)}
    for kind in sorted({one.kind for one in asked}):
        result[kind] = _means([one for one in asked if one.kind == kind])
    return result


def answered(asked: Sequence[Asked]) -> bool:
    """Whether any of the questions has a known answer."""
    return any(one.kind != NO_ANSWER for one in asked)


def _scores(model: Meter, batch: VqaBatch, unnamed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each question the best named label [B] int64, and the soft score of the first choice with its own picture and
    with another, [B] and [B] float32; NaN where the batch has no other. unnamed [A] bool."""
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.text_ids, batch.text_mask)
    labels, found = [], []
    others, there = other_pictures(batch.image_rows[:, None])
    for rows in (batch.image_rows, others.squeeze(1)):
        (fused,) = model.fuse_parts(text, image, batch.text_mask, (Part(Need.CLS, len(batch), rows),))
        logits = model.vqa_head(fused.cls)
        labels.append(logits.masked_fill(unnamed, float("-inf")).argmax(1))
        found.append(answer_scores(logits, batch.targets))
    return labels[0], found[0], found[1].masked_fill(~there, float("nan"))


def _kinds(targets: Tensor, answers: Answers) -> list[str]:
    """The kind of each question's best answer."""
    best, labels = targets.max(dim=1)
    pairs = zip(best.tolist(), labels.tolist(), strict=True)
    return [kind_of(answers.names[label]) if score > 0 else NO_ANSWER for score, label in pairs]


def _means(asked: Sequence[Asked]) -> dict[str, float]:
    other = [one.exchanged for one in asked if one.exchanged is not None]
    return {
        "score": math.fsum(one.score for one in asked) / len(asked),
        "exchanged": math.fsum(other) / len(other) if other else None,
        "count": len(asked),
    }
