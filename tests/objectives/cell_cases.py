"""Models and batches for the tests of masked image modelling. Helpers only, no tests."""

from dataclasses import replace

import numpy as np
import torch
from small_case import small_batch, small_model

from meter_fast.data.batch import PretrainBatch
from meter_fast.data.cell_masking import CellMasking
from meter_fast.models.config import ModelConfig, VisionConfig
from meter_fast.models.meter import Meter

CODES = 11
SMALL_VISION = {
    "clip_vit": VisionConfig(width=32, layers=2, heads=2, patch_size=8, image_size=24),
    "deit_distilled": VisionConfig("deit_distilled", width=32, layers=1, heads=2, patch_size=8, image_size=24),
    "beit": VisionConfig("beit", width=32, layers=1, heads=2, patch_size=8, image_size=24),
    "swin": VisionConfig("swin", width=128, layers=7, heads=8, patch_size=32, image_size=96),
    "volo": VisionConfig("volo", width=64, layers=9, heads=2, patch_size=8, image_size=24),
    "cait": VisionConfig("cait", width=32, layers=3, heads=2, patch_size=8, image_size=24),
}


def with_heads(fusion: str = "co_attention", vision: str = "clip_vit", fusion_layers: int = 2) -> Meter:
    """`small_model` with both heads of masked image modelling."""
    config = small_model(fusion=fusion, fusion_layers=fusion_layers).config
    return random_meter(replace(config, vision=SMALL_VISION[vision], mim_in_batch_head=True, mim_codes_head=CODES))


def random_meter(config: ModelConfig, **options) -> Meter:
    """A model whose weights are large enough for every path to matter."""
    torch.manual_seed(1)
    model = Meter(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def with_cells(batch: PretrainBatch | None = None, size: int = 24, grid: int = 3, share: float = 0.3) -> PretrainBatch:
    """`small_batch` with hidden cells and codes of them."""
    batch = batch or small_batch()
    if batch.images.shape[-1] != size:
        batch = replace(
            batch, images=torch.randn(len(batch), 3, size, size, generator=torch.Generator().manual_seed(3))
        )
    whole = torch.arange(len(batch) * grid**2).view(-1, grid, grid) * 7 % CODES
    masking = CellMasking(grid, share, tokenize=lambda _images: whole)
    return replace(batch, **masking.fields(batch.images, map(np.random.default_rng, range(len(batch)))))
