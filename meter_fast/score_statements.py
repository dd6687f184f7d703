"""How often a model judges statements about pictures rightly, NLVR2 or SNLI-VE: in all and by label, beside that with
other pictures.

Knows models, loaders of statements and names of labels. Knows nothing of runs or training.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from meter_fast.data.batch import StatementBatch
from meter_fast.data.statement_tables import TASKS
from meter_fast.exchanged import other_pictures
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import OBJECTIVES
from meter_fast.objectives.reading import fuse_readings


class Judged(NamedTuple):
    """One statement, what the model said and whether that is right, 0 or 1. sample: its number in the split; label: its
    own; said: the model's; exchanged: as `right` by other pictures, None where the batch has no others."""

    sample: int
    label: int
    said: int
    right: float
    exchanged: float | None


def score_statements(
    model: Meter, batches: Iterable[StatementBatch], task: str, device: torch.device | str
) -> dict[str, dict[str, float]]:
    """`summary` of `judge`."""
    return summary(judge(model, batches, device, task), task)


@torch.inference_mode()
def judge(model: Meter, batches: Iterable[StatementBatch], device: torch.device | str, task: str) -> list[Judged]:
    """Every statement of the batches, on this process. task: "nlvr2" or "snli_ve"."""
    was_training = model.training
    model.eval()
    judged: list[Judged] = []
    try:
        for batch in batches:
            columns = (batch.sample_ids, batch.labels, *_judgements(model, batch.to(device), task))
            rows = zip(*(column.tolist() for column in columns), strict=True)
            judged += [Judged(*row[:4], None if math.isnan(row[4]) else row[4]) for row in rows]
    finally:
        model.train(was_training)
    return judged


def summary(judged: Sequence[Judged], task: str) -> dict[str, dict[str, float]]:
    """{"all": {"accuracy", "exchanged", "chance", "count"}, label: {...}} over statements.

    accuracy: share judged rightly, of a label: among the statements that have it. exchanged: the same where each
    statement is judged by other pictures of its batch, none of them its own; over those alone for which there are some,
    None where there are none. chance: share of the statements that always giving the commonest label judges rightly
    ("all" only). Raises ValueError for no statement.
    """
    if not judged:
        raise ValueError("evaluation: the split gave no batch")
    chance = max(Counter(one.label for one in judged).values()) / len(judged)
    result = {"all": {**_means(judged), "chance": chance}}
    for number, name in enumerate(TASKS[task].labels):
        chosen = [one for one in judged if one.label == number]
        if chosen:
            result[name] = _means(chosen)
    return result


def _judgements(model: Meter, batch: StatementBatch, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """What is said of each statement, [B] int64, and whether it is judged rightly, 0 or 1, by its own pictures and by
    others, [B] and [B] float64; NaN where the batch has no others."""
    objective = OBJECTIVES[task]
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.text_ids, batch.text_mask)
    others, there = other_pictures(batch.image_rows)
    found = []
    for rows in (batch.image_rows, others):
        reading = objective.reading(replace(batch, image_rows=rows), 0)
        (fused,) = fuse_readings(model, text, image, batch.text_mask, (reading,))
        found.append(getattr(model, objective.HEAD)(fused.cls).argmax(-1))
    right, other = ((said == batch.labels).double() for said in found)
    return found[0], right, other.masked_fill(~there, float("nan"))


def _means(judged: Sequence[Judged]) -> dict[str, float]:
    other = [one.exchanged for one in judged if one.exchanged is not None]
    return {
        "accuracy": math.fsum(one.right for one in judged) / len(judged),
        "exchanged": math.fsum(other) / len(other) if other else None,
        "count": len(judged),
    }
