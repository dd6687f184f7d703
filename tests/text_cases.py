"""Small text encoders of every name, and texts for them. Helpers only, no tests."""

import dataclasses

import torch
from torch import Tensor, nn

from meter_fast.models.config import TextConfig
from meter_fast.models.text import build_text
from meter_fast.models.text_presets import TEXT_PRESETS

NAMED = {TEXT_PRESETS[name].config.name: name for name in ("clip_large", "roberta_large", *reversed(TEXT_PRESETS))}
LENGTHS = (9, 2, 5, 7)


def small(name: str, /, **changes: object) -> TextConfig:
    """Published but for the sizes."""
    published = TEXT_PRESETS[NAMED[name]].config
    sizes = {"width": 24, "layers": min(2, published.layers), "heads": 2, "ffn": 48, "vocab_size": 60}
    narrow = 8 if name in ("electra", "albert") else None
    pad_id = 58 if name == "clip" else published.pad_id
    return dataclasses.replace(
        published, **{**sizes, "max_positions": 20, "pad_id": pad_id, "embedding_width": narrow, **changes}
    )


def build(config: TextConfig, std: float = 0.1) -> nn.Module:
    torch.manual_seed(3)
    text = build_text(config)
    with torch.no_grad():
        for parameter in text.parameters():
            parameter += std * torch.randn_like(parameter)
    return text


def texts(config: TextConfig, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, config.vocab_size - 1, mask.shape, generator=generator)
    return ids.masked_fill(~mask, config.pad_id), mask
