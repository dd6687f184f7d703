"""A run that trains an image tokenizer: its data, its module, its files. Knows settings, the data room and the VQ-VAE;
nothing of steps.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from meter_fast.config import RunConfig
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import SampleOrder, micro_slices
from meter_fast.data.pictures import PictureAssembler, picture_split_loader
from meter_fast.data.sources import Sources, open_sources
from meter_fast.models.image_tokenizer import save_image_tokenizer
from meter_fast.models.vq_vae import VqVae
from meter_fast.objectives.reconstruction import ReconstructionLoss
from meter_fast.training.pairs import Pairs
from meter_fast.training.world import World


def open_pictures(
    config: RunConfig, world: World, sources: Sources, tokenizer: None, folder: None,
    accumulation: int, dtype: torch.dtype, answers: None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out split on this process's part of the run. tokenizer, folder, answers: none, as there
    are no texts. Raises ValueError."""
    data, engine, seed = config.data, config.engine, config.run.seed
    order = SampleOrder(sources.sizes, seed, engine.global_batch, sources.weights)
    backend = open_backend(
        data.backend, image_transform(data.transform, config.image_tokenizer.image_size), world.device, dtype,
        threads=max(1, data.workers), max_batch=max(4, engine.micro_batch),
    )  # fmt: skip
    assembler = PictureAssembler(sources, backend, seed, data.max_image_pixels)
    slices = micro_slices(engine.global_batch, world.size, engine.micro_batch, world.rank, accumulation, pairs=False)
    loader = TrainingLoader(order, assembler, slices, data.workers, data.prefetch, data.max_bad_share)
    held_out, validation = None, None
    if data.val_sources:
        held_out = open_sources(data.val_sources, data.root, split=data.val_split)
        shown = PictureAssembler(held_out, backend, seed, data.max_image_pixels, replace=False)
        validation = picture_split_loader(
            shown, batch_size=engine.micro_batch, rank=world.rank, world=world.size, limit=data.val_pairs,
            workers=data.workers, max_bad_share=data.max_bad_share,
        )  # fmt: skip
    return Pairs(None, None, sources, loader, backend, held_out, validation)


def make_tokenizer(config: RunConfig, from_files: bool) -> VqVae:
    """The VQ-VAE with random weights; there are no others to start it from but run.init."""
    return VqVae(config.image_tokenizer)


def with_loss(model: nn.Module, config: RunConfig) -> ReconstructionLoss:
    """What the engine runs."""
    return ReconstructionLoss(model, image_transform(config.data.transform, config.image_tokenizer.image_size))


def write_tokenizer(config: RunConfig, folder: Path, tensors: Mapping[str, Tensor], pairs: Pairs) -> None:
    """The export folder."""
    save_image_tokenizer(config.image_tokenizer, folder, tensors)
