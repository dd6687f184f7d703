"""Parameters that no chosen objective reaches. Knows models and the shape of a batch, nothing of engines.

A parameter without a gradient is left alone by AdamW, as published, but ZeRO gives it a gradient of zeros and so weight
decay. Freezing says the same to both.
"""

from functools import partial

import torch

from meter_fast.data.batch import Batch, PretrainBatch, RankedTexts, StatementBatch, TextToText, VqaBatch
from meter_fast.models.config import PLAIN_KERNELS, ModelConfig
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss


def freeze_unreached(module: JointLoss, config: ModelConfig) -> list[str]:
    """Freeze every parameter of `module` that gets no gradient from two samples. Returns their names.

    config: the model's. The passes are those of a twin without values: at 576 px real ones would take seconds, and
    more memory than the run itself.
    """
    with torch.device("meta"):
        twin = JointLoss(Meter(config, load_weights=False, kernels=PLAIN_KERNELS), module.objectives)
        smallest = SMALLEST.get(twin.objectives[0], _two_pairs)
        twin(smallest(config)).loss.backward()
    unreached = [name for name, p in twin.named_parameters() if p.grad is None]
    for name in unreached:
        module.get_parameter(name).requires_grad_(False)
    return unreached


def _two_questions(config: ModelConfig) -> Batch:
    """The smallest batch of visual question answering: two questions about one picture."""
    size, ids = config.vision.image_size, torch.full((2, 3), config.text.vocab_size - 1)
    return VqaBatch(
        images=torch.zeros(1, 3, size, size),
        image_rows=torch.zeros(2, dtype=torch.int64),
        text_ids=ids,
        text_mask=torch.ones(2, 3, dtype=torch.bool),
        targets=torch.zeros(2, config.vqa_answers),
        question_ids=torch.arange(2),
        sample_ids=torch.arange(2),
    )


def _two_statements(config: ModelConfig, pictures: int) -> Batch:
    """The smallest batch of a task of statements: two about the same pictures."""
    size, ids = config.vision.image_size, torch.full((2, 3), config.text.vocab_size - 1)
    return StatementBatch(
        images=torch.zeros(pictures, 3, size, size),
        image_rows=torch.arange(pictures).expand(2, -1),
        text_ids=ids,
        text_mask=torch.ones(2, 3, dtype=torch.bool),
        labels=torch.arange(2),
        sample_ids=torch.arange(2),
    )


def _two_pairs(config: ModelConfig) -> Batch:
    """The smallest batch that every objective of pre-training can be computed on."""
    size, token = config.vision.image_size, config.text.vocab_size - 1
    ids = torch.full((2, 3), token)
    grid = config.vision.grid
    hidden = torch.arange(2 * grid**2).view(2, grid, grid) % grid**2 == 0
    return PretrainBatch(
        images=torch.zeros(2, 3, size, size),
        text_ids=ids,
        text_mask=torch.ones(2, 3, dtype=torch.bool),
        masked_ids=ids,
        masked_rows=torch.tensor([1, 4]),
        masked_labels=torch.tensor([token, token]),
        itm_labels=torch.tensor([1, 0]),
        itm_images=torch.tensor([0, 0]),
        false_images=None,
        sample_ids=torch.tensor([0, 1]),
        cell_mask=hidden,
        cell_rows=torch.tensor([0, grid**2]),
        cell_codes=torch.tensor([0, 0]),
        span_denoising=_one_token_written(token),
        caption=_one_token_written(token),
        ranked=RankedTexts(torch.full((4, 3), token), torch.ones(4, 3, dtype=torch.bool)),
    )


def _one_token_written(token: int) -> TextToText:
    ids, lengths = torch.full((2, 1), token), torch.tensor([1, 1])
    return TextToText(ids, ids == token, torch.tensor([0, 1]), ids, lengths, torch.tensor([0, 1]))


SMALLEST = {  # batches of the objectives that train alone
    "vqa": _two_questions,
    "nlvr2": partial(_two_statements, pictures=2),
    "snli_ve": partial(_two_statements, pictures=1),
}
