"""Parameters that no chosen objective reaches. Knows a module and the shape of a batch, nothing of engines.

A parameter without a gradient is left alone by AdamW, as published, but ZeRO gives it a gradient of zeros and so weight
decay. Freezing says the same to both.
"""

import torch
from torch import nn

from meter_fast.data.batch import PretrainBatch, TextToText
from meter_fast.models.config import ModelConfig


def freeze_unreached(module: nn.Module, config: ModelConfig) -> list[str]:
    """Freeze every parameter of `module` (fp32, on the host) that gets no gradient from two pairs. Returns their
    names.
    """
    module.zero_grad(set_to_none=True)
    module(_two_pairs(config)).loss.backward()
    unreached = [name for name, p in module.named_parameters() if p.grad is None]
    for name, parameter in module.named_parameters():
        parameter.grad = None
        if name in unreached:
            parameter.requires_grad_(False)
    return unreached


def _two_pairs(config: ModelConfig) -> PretrainBatch:
    """The smallest batch that every objective can be computed on."""
    size, token = config.vision.image_size, config.text.vocab_size - 1
    ids = torch.full((2, 3), token)
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
        span_denoising=_one_token_written(token),
        caption=_one_token_written(token),
    )


def _one_token_written(token: int) -> TextToText:
    ids, lengths = torch.full((2, 1), token), torch.tensor([1, 1])
    return TextToText(ids, ids == token, torch.tensor([0, 1]), ids, lengths, torch.tensor([0, 1]))
