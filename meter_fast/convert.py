"""Published METER checkpoints to export folders and back, as files. What a tensor is called is known in `interop`.

The tensors that published models carry and never compute with (and the heads of other tasks) are kept beside the export
in `unused.safetensors`, so that the way back gives every value again.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from meter_fast import export_folder
from meter_fast.interop import LoadReport, from_meter, to_meter
from meter_fast.models.config import ModelConfig
from meter_fast.models.export import load_export, save_export
from meter_fast.models.files import read_tensors

UNUSED_FILE = "unused.safetensors"
TOKENIZER_OF = {"roberta": "roberta-base", "bert": "bert-base-uncased"}


def to_export(
    source: Path,
    out: Path,
    tokenizer: str | None = None,
    image_size: int | None = None,
    text_heads: int | None = None,
    fusion_heads: int | None = None,
) -> LoadReport:
    """Write the published checkpoint `source` as the export folder `out`. tokenizer: hub name or folder whose files go
    into it, or None. Raises ValueError where something does not fit, or `out` exists."""
    _must_be_new(out)
    known = None
    if tokenizer is not None:
        from meter_fast.data.tokenizer import load_tokenizer

        known = load_tokenizer(tokenizer)
    model, report = from_meter(source, image_size=image_size, text_heads=text_heads, fusion_heads=fusion_heads)
    save_export(model, out, None)
    try:
        if report.unused:
            save_file({name: value.contiguous().clone() for name, value in report.unused.items()}, out / UNUSED_FILE)
        if known is not None:
            known.save_pretrained(out / "tokenizer")
    except (SafetensorError, OSError) as error:
        shutil.rmtree(out)
        raise OSError(f"{out} could not be written ({error}): make room there") from error
    return report


def to_checkpoint(source: Path, out: Path) -> int:
    """Write the export folder or run directory `source` as a checkpoint that the published code reads, all its names.
    Returns how many tensors. Raises ValueError where there is no model, or `out` exists."""
    _must_be_new(out)
    folder = export_folder(source)
    model = load_export(folder)
    if model.config.text.name not in TOKENIZER_OF:
        raise ValueError(
            f"{folder} has text.name={model.config.text.name}: the published code knows {' and '.join(TOKENIZER_OF)} "
            "only; keep the folder"
        )
    unused = read_tensors(folder / UNUSED_FILE) if (folder / UNUSED_FILE).is_file() else None
    state = to_meter(model, unused)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        torch.save({"state_dict": state, "hyper_parameters": {"config": published_config(model.config)}}, temporary)
        temporary.rename(out)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"{out} could not be written ({error}): make room there") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(state)


def published_config(config: ModelConfig) -> dict[str, str | int | float]:
    """The entries of METER's configuration that say what the tensors' shapes do not."""
    return {
        "tokenizer": TOKENIZER_OF[config.text.name],
        "num_heads": config.fusion.heads,
        "num_layers": config.fusion.layers,
        "hidden_size": config.fusion.width,
        "input_image_embed_size": config.vision.width,
        "input_text_embed_size": config.text.width,
        "vocab_size": config.text.vocab_size,
        "image_size": config.vision.image_size,
        "drop_rate": config.fusion.dropout,
    }


def _must_be_new(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists already: give another name, or remove it first")
