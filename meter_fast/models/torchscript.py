"""Reads the tensors of a TorchScript archive without running anything in it. Knows the archive's layout, no models.

OpenAI publishes CLIP as such archives. `torch.jit.load` would also load the archive's code; here its pickle is read
with an unpickler that knows tensors, storages and containers and turns every scripted class into an inert object.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LIST_BUILDERS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
MARK = "/constants.pkl"  # every TorchScript archive has it, no other file of torch does


class _Scripted:
    """Stands for an object of a scripted class: holds its attributes, does nothing."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a scripted object with a state of type {type(state).__name__}")
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return _Scripted
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in LIST_BUILDERS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _first
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: tuple) -> Tensor:
        dtype, key = pid[1], pid[2]
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _first(value: object, _type_tag: object) -> object:
    return value


def _rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_unused: object) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(MARK) for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Tensors of a TorchScript archive under their module paths, in their own dtypes.

    Raises ValueError, naming the file and the cause, if its pickle asks for anything but tensors and containers.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith(MARK))[: -len(MARK)]
        try:
            module = _Unpickler(archive, root).load()
        except (
            pickle.UnpicklingError,
            KeyError,
            ValueError,
            TypeError,
            EOFError,
            RuntimeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{path}: not read, its pickle is not that of a scripted model: {error}") from error
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors, set())
    return tensors


def _collect(node: object, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    if isinstance(node, Tensor):
        tensors[prefix] = node
    elif isinstance(node, _Scripted) and id(node) not in seen:
        seen.add(id(node))
        for name, value in vars(node).items():
            _collect(value, f"{prefix}.{name}" if prefix else name, tensors, seen)
