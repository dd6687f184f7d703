"""Pre-training, fine-tuning and use of METER vision-and-language transformers, fast.

    import meter_fast
    model = meter_fast.load("runs/demo")
    model.match("dog.jpg", "a dog on a beach")

Importing this package is cheap: heavy libraries come with the first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meter_fast.models.meter import Meter
    from meter_fast.predict.predictor import Predictor

__all__ = ["Meter", "__version__", "load", "load_model"]
__version__ = "0.1.0"


def load(
    path: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    transform: str | None = None,
    answers: str | PathLike[str] | Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 32,
) -> Predictor:
    """The model at `path`, ready to be asked about pictures: answer, match, rank, fill, entails, compare, caption.

    path: an export folder, a run directory that has one, or a published METER checkpoint (.ckpt). tokenizer: folder or
    hub name, where none lies with the model. transform: "clip", "imagenet" or "vit", where the model does not tell.
    answers: a JSON list of texts, or the list, where no answers.json lies with the model. device: "cpu", "cuda". dtype:
    "fp32" or "bf16"; by default fp32 on the CPU and bf16 on CUDA. batch: pairs computed at a time. Nothing in it is run
    as code. Raises ValueError, naming what is wrong and the remedy.
    """
    from meter_fast.predict.opening import open_predictor

    return open_predictor(path, tokenizer, transform, answers, device, dtype, batch)


def load_model(path: str | PathLike[str]) -> Meter:
    """The bare model at `path`, which `load` opens, as a torch module: float32 on the CPU, in evaluation mode.

    Raises ValueError, naming path and remedy, for anything else and for weights that do not fit.
    """
    where = Path(path)
    if where.is_dir():
        from meter_fast.models.export import load_export

        return load_export(export_folder(where))
    if not where.exists():
        raise ValueError(f"{where} does not exist: give an export folder, a run directory or a METER .ckpt file")
    from meter_fast.interop.published import from_meter

    return from_meter(where)[0].eval()


def export_folder(path: str | PathLike[str]) -> Path:
    """The export folder that `path` is or, as a run directory, holds. Raises ValueError where there is none."""
    where = Path(path)
    for folder in (where, where / "export"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise ValueError(
        f"{where} has no model: neither model.safetensors nor export/model.safetensors is in it. "
        "Give an export folder, or the directory of a finished run"
    )


def __getattr__(name: str) -> object:
    if name == "Meter":
        from meter_fast.models.meter import Meter

        return Meter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
