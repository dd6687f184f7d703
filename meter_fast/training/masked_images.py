"""What masked image modelling adds to a run: the heads of the model, the hidden cells of the pictures and their codes.
Knows settings, models and the data room; nothing of steps.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.config import ConfigError, ObjectivesConfig, RunConfig
from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.images import ImageTransform, pixel_values
from meter_fast.models.config import VisionConfig
from meter_fast.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from meter_fast.models.vq_vae import VqVae


def fit_heads(config: RunConfig) -> RunConfig:
    """The configuration with the heads of masked image modelling that its objectives need, and no others."""
    names = config.objectives.names
    codes = open_image_tokenizer(config.objectives.image_tokenizer).codes if "mim_codes" in names else 0
    model = replace(config.model, mim_in_batch_head="mim_in_batch" in names, mim_codes_head=codes)
    return replace(config, model=model)


def open_cells(
    objectives: ObjectivesConfig, vision: VisionConfig, transform: ImageTransform, device: torch.device | str
) -> CellMasking | None:
    """What hides cells of the pictures, where an objective asks for it. Codes are made on `device`.

    Raises ValueError for an image tokenizer that is not there, or that was made for another grid."""
    if "mim_codes" in objectives.names:
        tokenizer = open_image_tokenizer(objectives.image_tokenizer).to(device)
        if isinstance(tokenizer, VqVae) and tokenizer.config.grid != vision.grid:
            raise ConfigError(
                f"objectives.image_tokenizer={objectives.image_tokenizer} gives {tokenizer.config.grid} x "
                f"{tokenizer.config.grid} codes a picture, model.vision has {vision.grid} x {vision.grid} cells: train "
                f"one with image_tokenizer.image_size={tokenizer.factor * vision.grid}"
            )
        return CellMasking(vision.grid, objectives.mim_probability, codes_by(tokenizer, transform, vision.grid))
    if "mim_in_batch" in objectives.names:
        return CellMasking(vision.grid, objectives.mim_probability)
    return None


def codes_by(tokenizer: ImageTokenizer, transform: ImageTransform, grid: int) -> Callable[[Tensor], Tensor]:
    """Normalised pictures [B,3,S,S] -> the code of each cell [B,grid,grid] int64, without gradient.

    As in the paper, pictures are resized so that the tokenizer gives as many codes as there are cells."""

    def tokenize(images: Tensor) -> Tensor:
        pixels = F.interpolate(
            pixel_values(images, transform), size=2 * [grid * tokenizer.factor], mode="bicubic", antialias=True
        )
        return tokenizer.encode(pixels.clamp(0, 1))

    return tokenize
