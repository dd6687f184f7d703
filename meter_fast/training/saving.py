"""Checkpoints of a running training, written while it goes on.

Knows the named state, the processes and one folder. Knows nothing of models or of when to save.

A step waits for no more than the copy: `save` collects the state of all processes in host memory of the main one, which
is collective and done by the calling thread; hashing, writing, flushing and the rename are done by a thread beside it.
The copy takes 12 bytes of the main process's host memory for each trained number (fp32 weight and two moments) and what
the frozen ones take; it is given back file by file. With `background=False` the state is written as it is collected: no
copy, and the steps wait.

One checkpoint is written at a time. A write that fails is told by `poll` and raised by `wait` on all processes; the
older checkpoints are then untouched.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from meter_fast.training import checkpoint
from meter_fast.training.checkpoint import CheckpointError, Writer
from meter_fast.training.resume import expected_bytes
from meter_fast.training.state import NamedState
from meter_fast.training.world import World

Named = tuple[str, str, Tensor]  # kind, name, and a tensor on the host that nobody else changes


@dataclass
class _Written:
    """How the write of a checkpoint ended: where it is, or why there is none."""

    step: int
    path: str = ""
    warnings: list[str] = field(default_factory=list)
    error: Exception | None = None


class Saver:
    """Writes the checkpoints of `state` into `folder` and keeps the last `keep_last` and the best.

    All calls are collective but `poll` and `close`. say: shows a line to people, on the main process.
    """

    def __init__(
        self,
        state: NamedState,
        world: World,
        folder: Path,
        keep_last: int,
        background: bool,
        say: Callable[[str], None],
    ) -> None:
        self._state = state
        self._world = world
        self._folder = folder
        self._keep_last = keep_last
        self._background = background
        self._say = say
        self._thread: threading.Thread | None = None
        self._step = 0
        self._written: _Written | None = None

    def save(self, step: int, description: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, with `description` beside the tensors. Waits for an earlier one first, and
        raises what `wait` raises."""
        if self._busy():
            self._say(f"step {step} waits for the checkpoint of step {self._step}: the disk takes longer than "
                      f"run.save_every leaves it")  # fmt: skip
        self.wait()
        self._step = step
        if not self._world.is_main:
            for _ in self._state.read():
                pass
        elif self._background:
            held = [(kind, name, _on_host(tensor)) for kind, name, tensor in self._state.read()]
            held.reverse()
            work = threading.Thread(target=self._write, args=(step, _given_away(held), description), daemon=True)
            self._thread = work
            work.start()
        else:
            tensors = ((kind, name, _on_host(tensor)) for kind, name, tensor in self._state.read())
            self._write(step, tensors, description)
            for _ in tensors:  # after an error: the others are in the same loop
                pass

    def poll(self) -> bool:
        """True on the main process when a write has failed: time for all to `wait`. Says what has been saved."""
        if self._busy():
            return False
        self._tell()
        return self._written is not None and self._written.error is not None

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError (StoppedTogether elsewhere) where it failed."""
        self._world.together(self._settle)

    def close(self) -> None:
        """Let a write that has begun come to its end, at whatever end of the run. Not collective."""
        if self._thread is not None:
            self._thread.join()
            self._tell()

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _settle(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._tell()
        written, self._written = self._written, None
        if written is not None and written.error is not None:
            raise CheckpointError(self._message(written)) from written.error

    def _tell(self) -> None:
        if self._written is not None and self._written.path:
            for line in self._written.warnings:
                self._say(f"warning: {line}")
            self._say(f"saved {self._written.path}")
            self._written = None

    def _write(self, step: int, tensors: Iterable[Named], description: dict[str, Any]) -> None:
        """Runs in the thread. Whatever goes wrong here has to reach the loop, where all processes hear of it."""
        writer: Writer | None = None
        try:
            writer = Writer(self._folder, step)
            for kind, name, tensor in tensors:
                writer.add(kind, name, tensor)
            path = writer.finish({"step": step, **description})
            self._written = _Written(step, str(path), checkpoint.prune(self._folder, self._keep_last))
        except Exception as error:
            if writer is not None:
                writer.abandon()
            self._written = _Written(step, error=error)

    def _message(self, written: _Written) -> str:
        error, folder = written.error, self._folder
        cause = (error.strerror if isinstance(error, OSError) else "") or f"{type(error).__name__}: {error}"
        whole = [str(checkpoint.path_of(folder, s)) for s in checkpoint.steps(folder)]
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return (
            f"the checkpoint of step {written.step} could not be written to {folder}: {cause}. It takes "
            f"{expected_bytes(self._state.numel()) / 1e9:.3g} GB, {free / 1e9:.3g} GB are free. "
            + (f"The last whole one is {whole[-1]}. " if whole else "There is no older one. ")
            + "Make room and run the same command again"
        )


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _given_away(held: list[Named]) -> Iterator[Named]:
    """The entries from the last to the first; each is the caller's alone, so that its memory goes with its file."""
    while held:
        yield held.pop()
