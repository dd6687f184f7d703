"""A trained model as a folder that needs neither DeepSpeed nor the code that trained it. Knows models and files, no
runs.

FOLDER/model.safetensors   weights, our names
FOLDER/config.json         {"format": "meter-fast", "version": 1, "model": {...}, "inputs": {...}}
FOLDER/tokenizer/          the tokenizer's files, as transformers writes them
FOLDER/answers.json        of a model that answers questions: the text of each answer, in order
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from meter_fast.models.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.files import read_json, read_tensors
from meter_fast.models.meter import Meter
from meter_fast.models.weights import copy_into

FORMAT, VERSION = "meter-fast", 1
WEIGHTS, CONFIG, TOKENIZER, ANSWERS = "model.safetensors", "config.json", "tokenizer", "answers.json"


def save_export(
    model: Meter,
    folder: str | Path,
    tokenizer_folder: str | Path | None,
    state: Mapping[str, Tensor] | None = None,
    answers: str | None = None,
    inputs: Mapping[str, str | int] | None = None,
) -> Path:
    """Writes the folder, complete or not at all; one that is there already is replaced. Returns its path.

    state: values to write in place of the model's own (the master weights of a ZeRO run), by our names, all of them.
    answers: what answers.json holds. inputs: "transform" and "max_text_length" of the pictures and texts that the model
    was trained on. tokenizer_folder: its files are copied; None leaves the tokenizer out. Raises
    ValueError for a folder that is not there or a state that is not the model's.
    """
    folder = Path(folder)
    if tokenizer_folder is not None and not Path(tokenizer_folder).is_dir():
        raise ValueError(
            f"tokenizer folder {tokenizer_folder} does not exist: give the folder that the run's tokenizer is in"
        )
    own = model.state_dict()
    if state is not None and set(state) != set(own):
        raise ValueError(f"the state to export is not that of the model: {sorted(set(state) ^ set(own))[:4]} differ")
    description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(_without_sources(model.config))}
    if inputs is not None:
        description["inputs"] = dict(inputs)
    return write_export(folder, state or own, description, tokenizer_folder, answers)


def write_export(
    folder: Path,
    state: Mapping[str, Tensor],
    description: dict[str, object],
    tokenizer_folder: str | Path | None = None,
    answers: str | None = None,
) -> Path:
    """Writes weights, description and what comes with them to `folder`, in one rename; what was there is replaced.
    Raises OSError, and leaves nothing, where the disk refuses."""
    hidden, old = (folder.with_name(f".{folder.name}.{kind}{os.getpid()}") for kind in ("", "old."))
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    try:
        save_file(tensors, hidden / WEIGHTS, metadata={"format": "pt"})
        (hidden / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if tokenizer_folder is not None:
            shutil.copytree(tokenizer_folder, hidden / TOKENIZER)
        if answers is not None:
            (hidden / ANSWERS).write_text(answers, encoding="utf-8")
        if folder.exists():  # set aside first: killed here, either of the two is whole
            folder.rename(old)
        hidden.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written ({error}): make room there") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def load_export(folder: str | Path) -> Meter:
    """The model of an exported folder, float32 on the CPU, in evaluation mode. Raises ValueError if it does not fit."""
    folder = Path(folder)
    description = read_json(folder / CONFIG)
    if description.get("format") != FORMAT:
        raise ValueError(f'{folder / CONFIG} is not that of a meter-fast model: it has no "format": "{FORMAT}"')
    if description.get("version") != VERSION:
        raise ValueError(
            f"{folder / CONFIG} has version {description.get('version')}, this program reads version {VERSION}"
        )
    model = Meter(_read_config(description.get("model"), folder / CONFIG), load_weights=False)
    copy_into(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.eval()


def read_inputs(folder: str | Path) -> dict[str, str | int]:
    """How the pictures and texts of an exported model were prepared: what `save_export` was told, or nothing. Raises
    ValueError naming the file."""
    path = Path(folder) / CONFIG
    inputs = read_json(path).get("inputs", {})
    if not isinstance(inputs, dict):
        raise ValueError(f'{path}: its "inputs" is no object; remove it')
    length, transform = inputs.get("max_text_length", 3), inputs.get("transform", "")
    if type(length) is not int or length < 3:
        raise ValueError(f'{path}: "max_text_length" of its "inputs" is {length!r}, and texts have 3 tokens or more')
    if not isinstance(transform, str):
        raise ValueError(f'{path}: "transform" of its "inputs" is {transform!r}, expected clip, imagenet or vit')
    return inputs


def _without_sources(config: ModelConfig) -> ModelConfig:
    """The configuration without the files that the encoders once started from."""
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, weights=None),
        text=dataclasses.replace(config.text, weights=None),
    )


def _read_config(values: object, where: Path) -> ModelConfig:
    try:
        parts = dict(values)
        vision, text, fusion = (
            VisionConfig(**parts.pop("vision")),
            TextConfig(**parts.pop("text")),
            FusionConfig(**parts.pop("fusion")),
        )
        decoder = DecoderConfig(**parts.pop("decoder", {}))  # exports of encoders may say nothing of one
        return ModelConfig(vision, text, fusion, decoder=decoder, **parts)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{where}: its "model" is not a configuration that this version knows ({error})') from error
