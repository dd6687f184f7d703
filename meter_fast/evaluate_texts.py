"""What scores of questions and of statements about pictures share: the model, this process's batches, the split's name.

Knows loaders and where a model's settings lie. Knows no scores.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import meter_fast
from meter_fast.config import RunConfig
from meter_fast.data.about_pictures import AboutPictures, most_pictures, split_loader
from meter_fast.data.images import ImageBackend, image_transform, open_backend
from meter_fast.data.loader import SplitLoader
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import check_vocabulary, tokenizer_of
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import OBJECTIVES
from meter_fast.training.world import World


def tuned(path: Path, task: str) -> Meter:
    """The model, which has the head of a task. Raises ValueError where it has not."""
    model, head = meter_fast.load_model(path), OBJECTIVES[task].HEAD
    if getattr(model, head) is None:
        start = path / "export" if (path / "export").is_dir() else path
        raise ValueError(f"{path} was not trained on {task} (it has no {head}): fine-tune it first, "
                         f"meter-fast train {task} run.init={start}")  # fmt: skip
    return model


def over_texts(
    path: Path,
    model: Meter,
    config: RunConfig,
    limit: int | None,
    world: World,
    assemble: Callable[[TextPipeline, ImageBackend], AboutPictures],
    judge: Callable[[Meter, SplitLoader, torch.device], list[Any]],
) -> tuple[list[Any], dict]:
    """What `judge` finds over this process's share of the texts of data.val_sources, and what is said of the split.
    limit: at most so many texts."""
    data, batch = config.data, config.engine.micro_batch
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    text = TextPipeline(tokenizer, min(data.max_text_length, model.config.text.max_length))
    transform = image_transform(data.transform, model.config.vision.image_size)
    backend = open_backend(data.backend, transform, world.device, torch.float32, max_batch=most_pictures(batch))
    try:
        assembler = assemble(text, backend)
        loader = split_loader(
            assembler, batch_size=batch, limit=limit, seed=config.run.seed, workers=data.workers,
            max_bad_share=data.max_bad_share,
        ).dealt(world.rank, world.size)  # fmt: skip
        found = judge(model.to(world.device), loader, world.device)
    finally:
        backend.close()
    sources = assembler.sources
    said = ", ".join(data.val_sources)
    if any(":" not in name for name in data.val_sources):
        said += f", {data.val_split} ({', '.join(Path(name).stem for name in sources.files)})"
    count = len(sources) if limit is None else min(limit, len(sources))
    return found, {"split": said, "tables": sources.files, "pairs": count, "skipped": dict(loader.skipped)}
