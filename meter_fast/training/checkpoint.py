"""Checkpoints on disk: complete or invisible, verified before they are believed, free of anything that could run.

Knows folders, hashes and safetensors. Knows nothing of models, DeepSpeed or ranks: one process calls it.

    CHECKPOINTS/step-00001000/
        weight-000.safetensors ...      fp32 master weights by parameter name, split into files of bounded size
        exp_avg-000.safetensors ...     Adam's moments by parameter name
        exp_avg_sq-000.safetensors ...
        frozen-000.safetensors ...      what is not trained, if anything
        state.json                      step, configuration, versions, counts
        manifest.json                   size and sha256 of each file above, and of itself

All is written into a hidden folder, flushed to the disk, and made visible by one rename.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT = 1
MANIFEST, STATE, BEST = "manifest.json", "state.json", "best.json"
FILE_BYTES = 1 << 29  # of tensors per file: writing takes twice as much host memory beside the tensors
_VISIBLE = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(writing|removing)-.*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or one that cannot be believed; the text names the folder and file."""


# ---------------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes one checkpoint: `add` tensors, then `finish`. After an error call `abandon`; nothing is visible before
    the end.

    Raises OSError as the disk does.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.final = folder / f"step-{step:08d}"
        self._hidden = folder / f".writing-step-{step:08d}-{uuid.uuid4().hex[:8]}"
        self._files: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_kind = ""
        self._pending_bytes = 0
        self._hidden.mkdir(parents=True)

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        """Take `tensor` (on the host, contiguous, not to be changed any more) as `name` of `kind`. Tensors of a kind
        come one after another."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and (kind != self._pending_kind or self._pending_bytes + size > FILE_BYTES):
            self._flush()
        self._pending_kind = kind
        self._pending[name] = tensor
        self._pending_bytes += size

    def finish(self, state: dict[str, Any]) -> Path:
        """Write `state` and the manifest and make the checkpoint visible. Returns its folder."""
        self._flush()
        self._write(STATE, json.dumps(state, indent=1).encode())
        write_durably(self._hidden / MANIFEST, _manifest_bytes({"format": FORMAT, "files": self._files}))
        _sync_folder(self._hidden)
        if self.final.exists():  # the same step saved twice; the older one is as good until the rename
            old = self.final.with_name(f".removing-{self.final.name}-{uuid.uuid4().hex[:8]}")
            self.final.rename(old)
            self._hidden.rename(self.final)
            shutil.rmtree(old)
        else:
            self._hidden.rename(self.final)
        _sync_folder(self.final.parent)
        return self.final

    def abandon(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        number = sum(name.startswith(f"{self._pending_kind}-") for name in self._files)
        self._write(f"{self._pending_kind}-{number:03d}.safetensors", safetensors.torch.save(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _write(self, name: str, content: bytes) -> None:
        write_durably(self._hidden / name, content)
        self._files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    """The manifest with its own hash, in the one form that `verify` accepts."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps(
        {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1, sort_keys=True
    ).encode()


# ---------------------------------------------------------------------------------------------------------- reading


def verify(folder: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file is there with the size and hash of the manifest."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was never finished ({error.strerror})") from None
    try:
        content = json.loads(raw)
        content.pop("sha256")
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST}: damaged, not a manifest") from None
    if raw != _manifest_bytes(content):
        raise CheckpointError(f"{folder / MANIFEST}: damaged, its content does not have its own sha256")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST}: format {content.get('format')}, this version reads {FORMAT}")
    for name, (size, sha256) in files.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST}: names a file outside of its folder, {name!r}")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path}: damaged, its sha256 is not the manifest's")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class Reader:
    """A verified checkpoint: its `state`, and its tensors by kind and name, read one at a time.

    Raises CheckpointError if the checkpoint is damaged or holds anything but safetensors and JSON."""

    def __init__(self, folder: Path) -> None:
        verify(folder)
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
            self.step = int(self.state["step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE}: not the state of a run ({error})") from None
        self._where: dict[tuple[str, str], Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            kind = path.name.rsplit("-", 1)[0]
            try:
                opened = safetensors.safe_open(path, framework="pt")
            except safetensors.SafetensorError as error:
                raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
            self._where.update({(kind, name): opened for name in opened.keys()})  # noqa: SIM118 (no iterator)

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a kind."""
        return {name: tuple(file.get_slice(name).get_shape()) for (k, name), file in self._where.items() if k == kind}

    def dtype(self, kind: str, name: str) -> str:
        """As the file says it: F32, BF16, ..."""
        return self._where[kind, name].get_slice(name).get_dtype()

    def tensor(self, kind: str, name: str) -> Tensor:
        """One tensor, on the host."""
        return self._where[kind, name].get_tensor(name)


# ------------------------------------------------------------------------------------------------ which ones there are


def steps(folder: Path) -> list[int]:
    """Steps of the visible checkpoints, ascending; whether they are whole is for `verify` to say."""
    if not folder.is_dir():
        return []
    found = (_VISIBLE.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is or would be."""
    return folder / f"step-{step:08d}"


@dataclass
class Choice:
    """What resuming found: the newest whole checkpoint, if any, and a line for everything that was passed over."""

    reader: Reader | None
    passed_over: list[str] = field(default_factory=list)


def newest(folder: Path) -> Choice:
    """The newest checkpoint that verifies. Damaged and unfinished ones are named in `passed_over`, never picked.

    Raises CheckpointError when there are checkpoints but none of them is whole: starting anew over them would hide
    it.
    """
    choice = Choice(None)
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if _HIDDEN.fullmatch(entry.name):
                choice.passed_over.append(f"{entry}: left by an interrupted write; it is removed at the next save")
            elif entry.name != BEST and not (entry.is_dir() and _VISIBLE.fullmatch(entry.name)):
                choice.passed_over.append(f"{entry}: not a checkpoint of this program; never opened")
    for step in reversed(steps(folder)):
        try:
            choice.reader = Reader(path_of(folder, step))
            return choice
        except CheckpointError as error:
            choice.passed_over.append(str(error))
    if steps(folder):
        told = "\n  ".join(choice.passed_over)
        raise CheckpointError(
            f"none of the checkpoints in {folder} is whole:\n  {told}\nRemove the folder to start from step 0, or "
            f"put a good copy back"
        )
    return choice


def prune(folder: Path, keep_last: int) -> list[str]:
    """Remove all but the last `keep_last` checkpoints and the best, and what interrupted writes have left. Returns a
    line for each folder that could not be removed: a full or odd disk must not end a run that has just been saved.
    """
    kept = set(steps(folder)[-keep_last:]) | {best(folder)[0]}
    old = [path_of(folder, step) for step in steps(folder) if step not in kept]
    old += [entry for entry in folder.iterdir() if _HIDDEN.fullmatch(entry.name)]
    failed = []
    for path in old:
        try:
            hidden = path
            if not _HIDDEN.fullmatch(path.name):  # hide first: a half-removed checkpoint must not be seen
                hidden = path.with_name(f".removing-{path.name}-{uuid.uuid4().hex[:8]}")
                path.rename(hidden)
            if hidden.is_dir():
                shutil.rmtree(hidden)
            else:
                hidden.unlink()
        except OSError as error:
            failed.append(f"could not remove {path}: {error.strerror}")
    return failed


def best(folder: Path) -> tuple[int | None, float]:
    """(step, score) of the best checkpoint so far, (None, infinity) if there is none. Lower is better."""
    try:
        content = json.loads((folder / BEST).read_text())
        return int(content["step"]), float(content["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, float("inf")


def mark_best(folder: Path, step: int, score: float) -> None:
    """Name `step` the best: `prune` keeps it."""
    temporary = folder / f".writing-{BEST}"
    write_durably(temporary, json.dumps({"step": step, "score": score}).encode())
    temporary.replace(folder / BEST)


def probe(folder: Path, expected_bytes: int) -> None:
    """Before training starts: can `folder` be written, and is there room for a checkpoint of `expected_bytes`?

    Raises CheckpointError."""
    trial = folder / f".writing-probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(trial, b"probe")
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"run.dir: cannot write into {folder}: {error.strerror}; choose another run.dir"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < expected_bytes:
        raise CheckpointError(
            f"run.dir: a checkpoint takes {expected_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            f"make room, choose another run.dir or lower run.keep_last"
        )
