"""A small model with a decoder and a batch of what it reads and writes, for tests. Helpers only, no tests."""

import torch
from torch import Tensor

from meter_fast.data.batch import PretrainBatch, TextToText
from meter_fast.models.config import (
    PLAIN_KERNELS,
    DecoderConfig,
    FusionConfig,
    KernelsConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from meter_fast.models.meter import Meter

WORDS, END = 50, 2
PLAIN = PLAIN_KERNELS
NAMES = ("span_denoising", "itm", "caption")


def decoder_config(fusion: str = "co_attention", layers: int = 2) -> ModelConfig:
    """Three tokens a side of the picture, heads of 32, no dropout."""
    return ModelConfig(
        vision=VisionConfig(width=48, layers=1, heads=2, patch_size=8, image_size=24, position_std=0.5),
        text=TextConfig("bert", 32, 1, 2, 64, vocab_size=WORDS, max_positions=16, dropout=0.0, pad_id=0),
        fusion=FusionConfig(fusion, width=64, layers=2, heads=2, dropout=0.0),
        mlm_head=False,
        init_std=0.2,
        decoder=DecoderConfig(layers=layers, max_positions=12),
    )


def decoder_model(
    fusion: str = "co_attention",
    dtype: torch.dtype = torch.float32,
    kernels: KernelsConfig = PLAIN,
    config: ModelConfig | None = None,
) -> Meter:
    """A random model whose weights and biases are large enough for every path to matter."""
    torch.manual_seed(1)
    model = Meter(config or decoder_config(fusion), kernels=kernels)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def texts_of(lengths: list[int], written: list[int], seed: int = 0) -> TextToText:
    """Random texts to read and to write, of these lengths; the latter with their end."""
    chance = torch.Generator().manual_seed(seed)
    ids, mask = _padded(lengths, chance)
    targets, real = _padded(written, chance)
    targets[torch.arange(len(written)), torch.tensor(written) - 1] = END
    rows = [part.flatten().nonzero().flatten() for part in (mask, real)]
    return TextToText(ids, mask, rows[0], targets, torch.tensor(written), rows[1])


def _padded(lengths: list[int], chance: torch.Generator) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(4, WORDS, mask.shape, generator=chance).masked_fill(~mask, 0), mask


def decoder_batch(dtype: torch.dtype = torch.float32) -> PretrainBatch:
    """Four pairs; texts of every objective differ in length."""
    whole = texts_of([7, 4, 5, 3], [2, 2, 2, 2], seed=3)
    places = torch.arange(4)
    return PretrainBatch(
        images=torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(5), dtype=dtype),
        text_ids=whole.ids,
        text_mask=whole.mask,
        masked_ids=whole.ids,
        masked_rows=torch.tensor([1, 8, 9]),
        masked_labels=whole.ids.flatten()[[1, 8, 9]],
        itm_labels=1 - places % 2,
        itm_images=places - places % 2,
        false_images=None,
        sample_ids=places,
        span_denoising=texts_of([5, 3, 6, 2], [3, 6, 2, 4], seed=1),
        caption=texts_of([3, 3, 3, 3], [8, 5, 4, 2], seed=2),
    )
