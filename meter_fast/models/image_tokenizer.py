"""Image tokenizers: pictures to discrete codes. Knows the kinds there are and their files, no text and no training.

FOLDER/model.safetensors   weights and codebook
FOLDER/config.json         {"format": "meter-fast image tokenizer", "version": 1, "model": {...}}
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from meter_fast.models.dalle_encoder import load_dalle_encoder
from meter_fast.models.export import CONFIG, WEIGHTS, write_export
from meter_fast.models.files import read_json, read_tensors
from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig
from meter_fast.models.vq_vae import VqVae
from meter_fast.models.weights import copy_into

FORMAT, VERSION = "meter-fast image tokenizer", 1


class ImageTokenizer(Protocol):
    """codes: how many there are. factor: pixels along one side of what a code stands for."""

    codes: int
    factor: int

    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S] float32, values in 0..1 -> codes [B,S/factor,S/factor] int64."""
        ...


def open_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The tokenizer at `path`: an export folder or the run directory of our own, or a file of the published DALL-E
    encoder. float32 on the CPU, in evaluation mode. Nothing in it is run. Raises ValueError."""
    path = Path(path)
    if path.is_dir():
        return load_image_tokenizer(path if (path / WEIGHTS).is_file() else path / "export")
    if not path.exists():
        raise ValueError(
            f"objectives.image_tokenizer={path} does not exist: give the folder that `train image_tokenizer` exported, "
            "or a file of the DALL-E encoder"
        )
    return load_dalle_encoder(path)


def save_image_tokenizer(config: ImageTokenizerConfig, folder: str | Path, state: Mapping[str, Tensor]) -> Path:
    """Writes the folder, complete or not at all. Raises ValueError for a state that is not that of such a model."""
    own = VqVae(config).state_dict()
    if set(state) != set(own):
        raise ValueError(f"the state to export is not that of the model: {sorted(set(state) ^ set(own))[:4]} differ")
    description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config)}
    return write_export(Path(folder), state, description)


def load_image_tokenizer(folder: str | Path) -> VqVae:
    """The tokenizer of an exported folder, float32 on the CPU, in evaluation mode. Raises ValueError."""
    where = Path(folder) / CONFIG
    description = read_json(where)
    if description.get("format") != FORMAT:
        raise ValueError(f'{where} is not that of an image tokenizer: it has no "format": "{FORMAT}"')
    if description.get("version") != VERSION:
        raise ValueError(f"{where} has version {description.get('version')}, this program reads version {VERSION}")
    try:
        config = ImageTokenizerConfig(**description["model"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{where}: its "model" is not one that this version knows ({error})') from error
    model = VqVae(config)
    copy_into(model, read_tensors(Path(folder) / WEIGHTS), str(Path(folder) / WEIGHTS))
    return model.eval()
