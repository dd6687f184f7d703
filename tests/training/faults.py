"""Faults at chosen places of a run, from one environment variable. Helpers only, no tests.

    METER_FAST_FAULT="kill@rank=1,step=3,place=forward"
    METER_FAST_FAULT="kill@step=40,ledger=/tmp/ledger;term@step=55,times=2,ledger=/tmp/ledger"

KIND@key=value,...; several behind each other with `;`. Kinds and places are those of KINDS and PLACES below. Keys:

    rank    which process, 0 unless told
    step    of the optimizer, from 0; at places write, rename and remove the step that the checkpoint is of
    place   step unless told
    micro   micro-batch of the step, from 0 (places forward and backward)
    file    which of the checkpoint's files, from 0 (place write)
    times   how often in all, 1 unless told
    seconds of kind sleep, 600 unless told
    ledger  a file that notes each time, so that `times` holds over restarts, too; without one each process counts

The package knows nothing of this: `install` wraps its functions. The folder faulty/ on PYTHONPATH does so in every
process that imports the trainer, however it was started.
"""

import errno
import importlib.abc
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

VARIABLE = "METER_FAST_FAULT"
KINDS = ("kill", "term", "hup", "int", "sleep", "error", "full-disk", "nan", "infinite-gradient")
PLACES = ("step", "forward", "backward", "data", "write", "rename", "remove")
WHERE = {"nan": ("forward",), "infinite-gradient": ("backward",), "full-disk": ("write",),
         "error": ("data", "write", "rename", "remove")}  # fmt: skip
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP, "int": signal.SIGINT}


@dataclass(frozen=True)
class Fault:
    """One entry of the variable."""

    kind: str
    rank: int = 0
    step: int = 0
    place: str = "step"
    micro: int = 0
    file: int = 0
    times: int = 1
    seconds: float = 600.0
    ledger: str = ""


def parse(text: str) -> list[Fault]:
    """The faults of the variable. Raises ValueError naming what is accepted."""
    return [_parse(entry.strip()) for entry in text.split(";")]


def _parse(entry: str) -> Fault:
    kind, _, rest = entry.partition("@")
    kinds = {field.name: field.type for field in fields(Fault)[1:]}
    if kind not in KINDS:
        raise ValueError(f"{VARIABLE}: unknown kind {kind!r} in {entry!r}; accepted: {', '.join(KINDS)}")
    values = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise ValueError(f"{VARIABLE}: unknown key {key!r} in {entry!r}; accepted: {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"{VARIABLE}: {key}={value!r} in {entry!r} is no {kinds[key].__name__}") from None
    accepted = WHERE.get(kind, PLACES)
    values.setdefault("place", accepted[0])
    if values["place"] not in accepted:
        raise ValueError(f"{VARIABLE}: {kind} at place {values['place']!r}; accepted: {', '.join(accepted)}")
    if ("file" in values and values["place"] != "write") or ("micro" in values and values["place"] not in PLACES[1:3]):
        raise ValueError(f"{VARIABLE}: {entry!r}: file goes with place=write, micro with place=forward or backward")
    return Fault(kind, **values)


def install(text: str | None = None) -> None:
    """Wrap the trainer's functions in this process for the faults of its rank (environment RANK, 0 without)."""
    rank = int(os.environ.get("RANK", "0"))
    mine = [fault for fault in parse(os.environ[VARIABLE] if text is None else text) if fault.rank == rank]
    for fault in mine:
        {"step": _at_step, "forward": _in_passes, "backward": _in_passes, "data": _at_data, "write": _at_write,
         "rename": _at_rename, "remove": _at_remove}[fault.place](fault, _Due(fault))  # fmt: skip


def install_with_the_trainer() -> None:
    """`install` as soon as the trainer's engine is imported, in this process."""
    sys.meta_path.insert(0, _WithEngine())


class _WithEngine(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "meter_fast.training.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_install(module) -> None:
            execute(module)
            install()

        spec.loader.exec_module = execute_and_install
        return spec


class _Due:
    """Whether a fault still has to happen; notes in the ledger that it does."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._key = repr(fault)
        self._left = fault.times

    def __call__(self) -> bool:
        if not self._fault.ledger:
            self._left -= 1
            return self._left >= 0
        path = Path(self._fault.ledger)
        noted = path.read_text().splitlines() if path.exists() else []
        if sum(json.loads(line)["fault"] == self._key for line in noted) >= self._fault.times:
            return False
        with open(path, "a") as file:
            file.write(json.dumps({"fault": self._key, "kind": self._fault.kind, "time": time.time()}) + "\n")
        return True


def _act(fault: Fault) -> None:
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind == "sleep":
        time.sleep(fault.seconds)
    elif fault.kind == "error":
        raise OSError(errno.EIO, "the disk has gone", fault.place)


def _at_step(fault: Fault, due: _Due) -> None:
    from meter_fast.training.engine import Engine

    before = Engine.step

    def step(self, step, batches, counts):
        if step == fault.step and due():
            _act(fault)
        return before(self, step, batches, counts)

    Engine.step = step


def _in_passes(fault: Fault, due: _Due) -> None:
    """Inside the forward or the backward pass of a micro-batch."""
    import torch

    from meter_fast.training.engine import Engine, PlainOutputs

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            _act(fault)
            return grad * float("inf") if fault.kind == "infinite-gradient" else grad

    now = {"step": -1, "micro": 0}
    step_before, forward_before = Engine.step, PlainOutputs.forward

    def step(self, step, batches, counts):
        now.update(step=step, micro=-1)
        return step_before(self, step, batches, counts)

    def forward(self, batch, totals=None):
        loss, parts, metrics = forward_before(self, batch, totals)
        if not self.training:
            return loss, parts, metrics
        now["micro"] += 1
        if (now["step"], now["micro"]) != (fault.step, fault.micro) or not due():
            return loss, parts, metrics
        if fault.place == "backward":
            return Through.apply(loss), parts, metrics
        _act(fault)
        if fault.kind == "nan":
            return loss * float("nan"), {name: part * float("nan") for name, part in parts.items()}, metrics
        return loss, parts, metrics

    Engine.step, PlainOutputs.forward = step, forward


def _at_data(fault: Fault, due: _Due) -> None:
    from meter_fast.data.loader import TrainingLoader

    before = TrainingLoader.steps

    def steps(self, start, stop):
        for number, batches in enumerate(before(self, start, stop), start):
            if number == fault.step and due():
                _act(fault)
            yield batches

    TrainingLoader.steps = steps


def _at_write(fault: Fault, due: _Due) -> None:
    """In the middle of a file of a checkpoint: half of it is on the disk."""
    from meter_fast.training import checkpoint

    before, count = checkpoint.write_durably, {}

    def write(path: Path, content: bytes) -> None:
        if path.parent.name.startswith(f".writing-step-{fault.step:08d}"):
            number = count.setdefault(path.parent.name, 0)
            count[path.parent.name] += 1
            if number == fault.file and due():
                path.write_bytes(content[: len(content) // 2])
                if fault.kind == "full-disk":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _act(fault)
        before(path, content)

    checkpoint.write_durably = write


def _at_rename(fault: Fault, due: _Due) -> None:
    """All files of the checkpoint are written and it is not yet visible."""
    before = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(f".writing-step-{fault.step:08d}") and due():
            _act(fault)
        return before(self, target)

    Path.rename = rename


def _at_remove(fault: Fault, due: _Due) -> None:
    """When a checkpoint that is not kept any longer is removed."""
    before = shutil.rmtree

    def remove(path, *arguments, **options):
        if f"step-{fault.step:08d}" in Path(path).name and due():
            _act(fault)
        return before(path, *arguments, **options)

    shutil.rmtree = remove


def environment(text: str) -> dict[str, str]:
    """What to add to the environment of a command so that its trainer has these faults."""
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(here / "faulty"), str(here), os.environ.get("PYTHONPATH")]))
    return {VARIABLE: text, "PYTHONPATH": path}
