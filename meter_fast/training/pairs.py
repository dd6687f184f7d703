"""The data of a run, opened as its settings say: tokenizer, and the sources and loaders of pre-training.

Knows settings and the data room. Knows nothing of models beyond the sizes they must agree on, nothing of steps.
"""

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.config import ConfigError, DataConfig, RunConfig
from meter_fast.data.answers import Answers
from meter_fast.data.false_texts import FalseTexts
from meter_fast.data.images import ImageBackend, image_transform, open_backend
from meter_fast.data.loader import EvaluationLoader, PretrainLoader, SplitLoader, TrainingLoader
from meter_fast.data.order import SampleOrder
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.spans import add_sentinels, longest_target, open_denoiser, sentinel, sentinels_for
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer
from meter_fast.score_retrieval import HeldOutPictures
from meter_fast.training.masked_images import open_cells
from meter_fast.training.world import World

TRAINED, OF_INIT = "trained", "init"
CAPTIONS_TO_LEARN_FROM = 200_000


@dataclass(frozen=True)
class Pairs:
    """Everything that gives batches. `tokenizer_folder` holds the tokenizer's files (main process only); None and None
    where no texts are read."""

    tokenizer: PreTrainedTokenizerFast | None
    tokenizer_folder: Path | None
    sources: Sources
    loader: TrainingLoader
    backend: ImageBackend
    held_out: Sources | None
    validation: SplitLoader | HeldOutPictures | None
    answers: Answers | None = None  # of visual question answering

    @property
    def samples_a_draw(self) -> float:
        """Samples of one place of the global batch, on average: 1, but where they are read by group."""
        sizes = self.loader.order.sizes
        shares = self.sources.weights or sizes
        samples = (share * n / draws for share, n, draws in zip(shares, self.sources.sizes, sizes, strict=True))
        return sum(samples) / sum(shares)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed: how many samples each source has, and the vocabulary."""
        vocabulary = vocabulary_hash(self.tokenizer) if self.tokenizer is not None else ""
        told = {"samples": self.sources.sizes, "vocabulary": vocabulary}
        return told if self.answers is None else {**told, "answers": self.answers.hash()}

    def close(self) -> None:
        """Free threads and device memory."""
        self.backend.close()


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over all tokens and their ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def open_tokenizer(config: RunConfig, world: World, sources: Sources) -> tuple[PreTrainedTokenizerFast, Path]:
    """The run's tokenizer, and the folder of its files, run.dir/tokenizer, for the export (main process only).
    Collective.

    The main process opens it, or with data.tokenizer=trained learns it from the texts, once for the whole run;
    the others get its files from there. Raises ValueError (StoppedTogether on the others).
    """
    kept = Path(config.run.dir) / "tokenizer"

    def files() -> dict[str, str]:
        if config.data.tokenizer != TRAINED:
            init = config.data.tokenizer == OF_INIT
            tokenizer = load_tokenizer(tokenizer_of_init(config.run.init) if init else config.data.tokenizer)
            add_sentinels(tokenizer, _sentinels(config))
            tokenizer.save_pretrained(kept)
        elif not (kept / "tokenizer.json").is_file():
            text = config.model.text
            kind = "roberta" if text.counts_from_padding else "bert"
            train_tokenizer(_captions(sources), kept, kind, text.vocab_size, _sentinels(config))
        return {path.name: path.read_text(encoding="utf-8") for path in kept.iterdir() if path.is_file()}

    content = world.together(files)
    if world.is_main:
        return load_tokenizer(kept), kept
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in content.items():
            Path(scratch, name).write_text(text, encoding="utf-8")
        return load_tokenizer(scratch), kept


def tokenizer_of_init(init: str) -> Path:
    """The tokenizer that lies with an export folder, a run directory or a checkpoint. Raises ConfigError."""
    path = Path(init)
    if init:
        for folder in (path / "tokenizer", path.parent.parent / "tokenizer"):
            if (folder / "tokenizer.json").is_file():
                return folder
    raise ConfigError(
        f"data.tokenizer=init: run.init={init or '(empty)'} has no tokenizer with it: give the folder or hub name of "
        "the one that its text encoder knows, or, to start at random, data.tokenizer=trained"
    )


def fit_length(config: RunConfig, samples: int) -> RunConfig:
    """The configuration with run.max_steps in place of run.max_epochs: so many steps that each of `samples`, or of so
    many groups of samples, is read that often, the last step filled up from the next pass."""
    if not config.run.max_epochs:
        return config
    steps = max(1, math.ceil(config.run.max_epochs * samples / config.engine.global_batch))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, max_steps=steps, max_epochs=0.0))


def open_images(config: RunConfig, world: World, dtype: torch.dtype, most: int = 4) -> ImageBackend:
    """The image back end of a run on this process's device. most: pictures in one batch, where these are more than two
    for each sample."""
    return open_backend(
        config.data.backend, image_transform(config.data.transform, config.model.vision.image_size), world.device,
        dtype, threads=max(1, config.data.workers), max_batch=max(most, 2 * config.engine.micro_batch),
    )  # fmt: skip


def open_augmentation(config: RunConfig) -> RandAugment | None:
    """What training pictures undergo before they are resized, None for nothing."""
    if config.data.augment == "none":
        return None
    return RandAugment(config.data.augment, config.run.seed, config.engine.global_batch)


def _sentinels(config: RunConfig) -> int:
    return sentinels_for(*_spans(config))


def _spans(config: RunConfig) -> tuple[tuple[str, ...], int, float, float]:
    goals = config.objectives
    return goals.names, config.data.max_text_length, goals.span_probability, goals.span_length


def _captions(sources: Sources) -> Iterator[str]:
    """Captions spread evenly over all sources."""
    every = max(1, len(sources) // CAPTIONS_TO_LEARN_FROM)
    return (sources.read(index).text for index in range(0, len(sources), every))


def fit_vocabulary(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> RunConfig:
    """The configuration with the text encoder's vocabulary and padding id those of the tokenizer.

    Only where the encoder starts at random; one with weights of its own must already agree, but for sentinels behind
    its vocabulary. Raises ConfigError."""
    text = config.model.text
    size, pad = len(tokenizer), tokenizer.pad_token_id
    if text.weights is None:
        text = dataclasses.replace(text, vocab_size=size, pad_id=pad)
    elif size - text.vocab_size in range(1, _sentinels(config) + 1):
        beyond = tokenizer.convert_ids_to_tokens(list(range(text.vocab_size, size)))
        if set(beyond) <= {sentinel(number) for number in range(_sentinels(config))}:
            text = dataclasses.replace(text, vocab_size=size, added_tokens=len(beyond))
    if size > text.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {size} tokens, model.text.vocab_size={text.vocab_size} rows: "
            f"choose the tokenizer that belongs to the weights"
        )
    if pad != text.pad_id:
        raise ConfigError(f"data.tokenizer={config.data.tokenizer} pads with {pad}, the text encoder with "
                          f"{text.pad_id}: choose the tokenizer that belongs to the weights")  # fmt: skip
    if config.data.max_text_length > text.max_length:
        raise ConfigError(f"data.max_text_length={config.data.max_text_length}: the text encoder has "
                          f"{text.max_length} positions; lower it or raise model.text.max_positions")  # fmt: skip
    longest, positions = longest_target(*_spans(config)), config.model.decoder.max_positions
    if longest > positions:
        raise ConfigError(
            f"model.decoder.max_positions={positions}: of captions of data.max_text_length="
            f"{config.data.max_text_length} tokens texts of up to {longest} are written; raise it"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def open_training_sources(data: DataConfig) -> Sources:
    """The sources of training. Raises ValueError naming what is missing and where."""
    return open_sources(data.sources, data.root, split="train", weights=data.weights or None)


def open_pairs(
    config: RunConfig, world: World, sources: Sources, tokenizer: PreTrainedTokenizerFast, folder: Path,
    accumulation: int, dtype: torch.dtype, answers: Answers | None = None,
) -> Pairs:  # fmt: skip
    """Order, loader and held-out split of pre-training on this process's part of the run. Raises ValueError.

    answers: none here; the argument is there as every task opens its data in the same way.
    """
    data, goals, engine = config.data, config.objectives, config.engine
    from_batch = goals.itm_negatives == "batch"
    order = SampleOrder(
        sources.sizes, config.run.seed, engine.global_batch, sources.weights, sources.image_ids if from_batch else None
    )
    denoiser = open_denoiser(tokenizer, goals.names, goals.span_probability, goals.span_length)
    text = TextPipeline(tokenizer, data.max_text_length, goals.masking, goals.mlm_probability, denoiser)
    backend = open_images(config, world, dtype)
    cells = open_cells(goals, config.model.vision, backend.transform, world.device)
    false_texts = None
    if "retrieval" in goals.names:
        false_texts = FalseTexts(sources, config.run.seed, goals.false_texts, goals.false_text_choice)
    loader = PretrainLoader(
        sources, order, text, backend, rank=world.rank, world=world.size, micro_batch=engine.micro_batch,
        accumulation=accumulation, negatives=goals.itm_negatives, seed=config.run.seed, workers=data.workers,
        prefetch=data.prefetch, max_bad_share=data.max_bad_share, max_image_pixels=data.max_image_pixels, cells=cells,
        augment=open_augmentation(config),
        false_texts=false_texts,
    )  # fmt: skip
    held_out, validation = None, None
    if data.val_sources:
        held_out = open_sources(data.val_sources, data.root, split=data.val_split)
        validation = EvaluationLoader(
            held_out, text, backend, batch_size=max(2, engine.micro_batch // 2 * 2), rank=world.rank, world=world.size,
            limit=data.val_pairs, workers=data.workers, max_bad_share=data.max_bad_share,
            max_image_pixels=data.max_image_pixels, cells=cells,
        )  # fmt: skip
    return Pairs(tokenizer, folder, sources, loader, backend, held_out, validation)
