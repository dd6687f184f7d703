"""Reads files of tensors without running code from them. Knows file formats, nothing of models.

safetensors, PyTorch files (`weights_only=True`, which admits tensors and plain containers), TorchScript archives.
"""

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from meter_fast.models.torchscript import is_torchscript, read_torchscript

READ_ERRORS = (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, AssertionError)


def read_checkpoint(path: str | Path, inert: Sequence[tuple[type, str]] = ()) -> dict:
    """What a file holds: a dict of tensors (on the CPU), or the dict that a training program saved around them.

    inert and errors: as for `read_content`; anything but a dict is one.
    """
    content = read_content(path, inert)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors: is it a checkpoint?")
    return content


def read_content(path: str | Path, inert: Sequence[tuple[type, str]] = ()) -> object:
    """What a file holds: tensors (on the CPU), plain containers, and objects of the classes in `inert`.

    inert: (class, full name) pairs: where the file names such a class, the harmless class given is used in its place.
    Raises ValueError, naming the file and the remedy: no such file, a folder, empty, damaged, or one that asks to run
    code.
    """
    path = Path(path)
    _check_is_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}): copy it again") from error
    if is_torchscript(path):
        return read_torchscript(path)
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(list(inert)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not opened: {_why_refused(path, inert)}. Nothing of it was run. If you trust its "
            "source, save the state dict alone, as tensors, in the program that made it"
        ) from error
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} is no readable PyTorch file ({_short(error)}): is it damaged? copy it again"
        ) from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name; a dict under "state_dict" or "model" is opened. Raises ValueError as above."""
    content = read_checkpoint(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors: is it a file of weights?")
    return tensors


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises ValueError naming the file."""
    path = Path(path)
    _check_is_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, an object was expected")
    return content


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path ({_what_is_there(path.parent)})")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, a file was expected ({_what_is_there(path)})")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): copy it again")


def _check_sums(path: Path) -> None:
    """Compare a zip archive, which PyTorch writes, with its own check sums; torch reads past them."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # older than these archives, or torn: whoever reads it says so
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} is no readable PyTorch file ({_short(error)}): is it damaged? copy it again"
        ) from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it does not have its check sum; copy it again")


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{folder} holds {', '.join(names[:6]) or 'nothing'}{more}"


def _why_refused(path: Path, inert: Sequence[tuple[type, str]]) -> str:
    """What a file asks for besides tensors and containers. (torch's own message advises to load it all the same.)"""
    try:
        with torch.serialization.safe_globals(list(inert)):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, *READ_ERRORS):
        names = []
    if not names:
        return "it is no PyTorch file, or damaged"
    return f"it asks to run code while loading ({', '.join(sorted(names)[:4])})"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
