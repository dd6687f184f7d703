"""Model, tokenizer, transform and answers of a path, put together. Knows files of models, and which encoder was trained
on which pixel values.

An export says how its pictures and texts were prepared, for all else the kind of vision encoder decides, where it can.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from meter_fast import export_folder, load_model
from meter_fast.convert import TOKENIZER_OF
from meter_fast.data.answers import Answers, read_answers
from meter_fast.data.images import ImageTransform, image_transform
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.models.config import ModelConfig
from meter_fast.models.export import ANSWERS, TOKENIZER, read_inputs
from meter_fast.models.vision_presets import VISION_PRESETS
from meter_fast.predict.encoded import MAX_TEXT_LENGTH
from meter_fast.predict.predictor import Predictor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_predictor(
    path: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    transform: str | None = None,
    answers: str | PathLike[str] | Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 32,
) -> Predictor:
    """What `meter_fast.load` returns. Raises ValueError where something is missing or does not fit, naming the
    remedy."""
    where = _device(device)
    kind = _dtype(dtype, where)
    model = load_model(path)
    folder = export_folder(path) if Path(path).is_dir() else None
    inputs = read_inputs(folder) if folder is not None else {}
    opened = _tokenizer(Path(path), folder, tokenizer, model.config)
    pixels = _transform(transform or inputs.get("transform"), model.config)
    names = _answers(folder, answers, model.config)
    length = inputs.get("max_text_length", MAX_TEXT_LENGTH)
    return Predictor(model.to(where, kind), opened, pixels, names, length, batch, str(path))


def _device(device: str) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no device: give cpu, cuda or cuda:NUMBER") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not one that models run on here: give cpu, cuda or cuda:NUMBER")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch finds no CUDA device here: give device=cpu")
    return where


def _dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: give {' or '.join(DTYPES)}")
    return DTYPES[dtype]


def _tokenizer(path: Path, folder: Path | None, given: str | PathLike[str] | None, config: ModelConfig):
    if given is None:
        if folder is None or not (folder / TOKENIZER).is_dir():
            hub = TOKENIZER_OF.get(config.text.name)
            example = f", for published models {hub}" if hub else ""
            raise ValueError(f"{path} has no tokenizer with it: give tokenizer=, a folder or hub name{example}")
        given = folder / TOKENIZER
    tokenizer = load_tokenizer(given)
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"tokenizer {given} has {len(tokenizer)} tokens, {path} {config.text.vocab_size}: give tokenizer=, the one "
            "that the model was trained with"
        )
    return tokenizer


def _transform(name: str | None, config: ModelConfig) -> ImageTransform:
    """As told; else as the published encoders of this kind were trained."""
    vision = config.vision
    if name is None:
        known = {preset.transform for preset in VISION_PRESETS.values() if preset.config.name == vision.name}
        if len(known) != 1:
            raise ValueError(
                f"encoders of the kind vision.name={vision.name} were trained on different pixel values: give "
                "transform=, clip, imagenet or vit (data.transform of the run)"
            )
        name = known.pop()
    return image_transform(name, vision.image_size)


def _answers(
    folder: Path | None, given: str | PathLike[str] | Sequence[str] | None, config: ModelConfig
) -> Answers | None:
    """The label space that was given or lies with the model; None where there is none."""
    if given is None:
        if folder is None or not (folder / ANSWERS).is_file() or not config.vqa_answers:
            return None
        given = folder / ANSWERS
    elif not config.vqa_answers:
        raise ValueError("answers= goes with a model that answers questions, this one has no vqa_head: leave it out")
    if isinstance(given, (str, PathLike)):
        answers = read_answers(given)
    elif isinstance(given, Sequence) and all(name is None or isinstance(name, str) for name in given):
        answers = Answers(tuple(given))
    else:
        raise ValueError(
            "answers= is a list of texts, label 0 first, or a JSON file of one; this one holds other things"
        )
    if len(answers) != config.vqa_answers:
        said = given if isinstance(given, (str, PathLike)) else "the list"
        raise ValueError(
            f"answers={said}: {len(answers)} answers, the model has {config.vqa_answers}: give those that it was "
            "trained with"
        )
    return answers
