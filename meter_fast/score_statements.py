"""How often a model judges statements about pictures rightly, NLVR2 or SNLI-VE: in all and by label, beside that with
other pictures.

Knows models, loaders of statements and names of labels. Knows nothing of runs or training.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from meter_fast.data.batch import StatementBatch
from meter_fast.data.statement_tables import TASKS
from meter_fast.exchanged import other_pictures
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import OBJECTIVES
from meter_fast.objectives.reading import fuse_readings


@torch.inference_mode()
def score_statements(
    model: Meter, batches: Iterable[StatementBatch], task: str, device: torch.device | str
) -> dict[str, dict[str, float]]:
    """{"all": {"accuracy", "exchanged", "chance", "count"}, label: {...}} over the statements of all batches, on one
    process.

    task: "nlvr2" or "snli_ve". accuracy: share judged rightly, of a label: among the statements that have it.
    exchanged: the same where each statement is judged by other pictures of its batch, none of them its own; over those
    alone for which there are some, None where there are none. chance: share of the statements that always giving the
    commonest label judges rightly ("all" only). Raises ValueError for no batch.
    """
    was_training = model.training
    model.eval()
    own, other, labels = [], [], []
    try:
        for batch in batches:
            right, exchanged = _right(model, batch.to(device), task)
            own.append(right.cpu())
            other.append(exchanged.cpu())
            labels.append(batch.labels)
    finally:
        model.train(was_training)
    if not own:
        raise ValueError("evaluation: the split gave no batch")
    right, exchanged, label = torch.cat(own), torch.cat(other), torch.cat(labels)
    chance = label.bincount().max().item() / len(label)
    result = {"all": {**_means(right, exchanged), "chance": chance}}
    for number, name in enumerate(TASKS[task].labels):
        chosen = label == number
        if chosen.any():
            result[name] = _means(right[chosen], exchanged[chosen])
    return result


def _right(model: Meter, batch: StatementBatch, task: str) -> tuple[Tensor, Tensor]:
    """Whether each statement is judged rightly, 0 or 1, by its own pictures and by others, [B] and [B] float64; NaN
    where the batch has no others."""
    objective = OBJECTIVES[task]
    image = model.encode_image(batch.images)
    text = model.encode_text(batch.text_ids, batch.text_mask)
    others, there = other_pictures(batch.image_rows)
    found = []
    for rows in (batch.image_rows, others):
        reading = objective.reading(replace(batch, image_rows=rows), 0)
        (fused,) = fuse_readings(model, text, image, batch.text_mask, (reading,))
        found.append((getattr(model, objective.HEAD)(fused.cls).argmax(-1) == batch.labels).double())
    return found[0], found[1].masked_fill(~there, float("nan"))


def _means(right: Tensor, exchanged: Tensor) -> dict[str, float]:
    other = exchanged[~exchanged.isnan()]
    return {
        "accuracy": right.mean().item(),
        "exchanged": other.mean().item() if len(other) else None,
        "count": len(right),
    }
