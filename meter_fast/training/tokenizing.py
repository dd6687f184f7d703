"""A run that trains an image tokenizer: its data, its module, its files. Knows settings, the data room and the VQ-VAE;
nothing of steps.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from meter_fast.config import RunConfig
from meter_fast.data.images import image_transform, open_backend, pixel_values
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import SampleOrder, micro_slices
from meter_fast.data.pictures import PictureAssembler, picture_split_loader
from meter_fast.data.sources import Sources, open_sources
from meter_fast.models.image_tokenizer import save_image_tokenizer
from meter_fast.models.vq_vae import VqVae
from meter_fast.objectives.reconstruction import ReconstructionLoss
from meter_fast.training.pairs import Pairs, open_augmentation
from meter_fast.training.world import World

SHOWN = 8  # pictures


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
    assembler = PictureAssembler(sources, backend, seed, data.max_image_pixels, augment=open_augmentation(config))
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


@torch.no_grad()
def show_reconstructions(module: ReconstructionLoss, pairs: Pairs, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Held-out pictures in a row, above what their codes give back: uint8 [3,2S,n*S] on the CPU. Collective."""
    with contextlib.closing(iter(pairs.validation)) as batches:
        images = next(batches).images[:SHOWN].to(device, dtype)
    was_training = module.training
    module.eval()
    pictures = pixel_values(images, module.transform)
    rebuilt = module.model(pictures)[0].clamp(0, 1)
    module.train(was_training)
    rows = [torch.cat(list(row), dim=2) for row in (pictures, rebuilt)]
    return (torch.cat(rows, dim=1) * 255).round().byte().cpu()


def write_tokenizer(config: RunConfig, folder: Path, tensors: Mapping[str, Tensor], pairs: Pairs) -> None:
    """The export folder."""
    save_image_tokenizer(config.image_tokenizer, folder, tensors)
