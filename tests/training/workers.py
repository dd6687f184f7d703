"""What the ranks of a test run: training with a record of what each step saw, and faults at chosen places."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from meter_fast import train as program
from meter_fast.data.loader import PretrainLoader
from meter_fast.objectives.joint import JointLoss, Losses
from meter_fast.training import checkpoint
from meter_fast.training.engine import Engine


def train(argv: Sequence[str], fault: str = "", at: int = -1, on_rank: int = 0) -> int:
    """meter_fast.train in this process. `fault` names a function here that arms `at` (a step, or a count) on `on_rank`.

    Each step's sample ids go to run.dir/samples-RANK.jsonl."""
    rank = int(os.environ["RANK"])
    run_dir = next(Path(a.partition("=")[2]) for a in argv if a.startswith("run.dir="))
    watch_samples(run_dir / f"samples-{rank}.jsonl")
    if fault and rank == on_rank:
        FAULTS[fault](at)
    return program.main(argv)


def watch_samples(path: Path) -> None:
    """Note the sample ids of each step, by micro-batch."""
    step_of = Engine.step

    def step(self, step, batches, counts):
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "samples": [b.sample_ids.tolist() for b in batches]}) + "\n")
        return step_of(self, step, batches, counts)

    Engine.step = step


def before_step(act):
    """A fault that `act`s when the engine is about to do step `at`."""

    def arm(at: int) -> None:
        step_of = Engine.step

        def step(self, step, batches, counts):
            if step == at:
                act()
            return step_of(self, step, batches, counts)

        Engine.step = step

    return arm


def not_a_number(at: int) -> None:
    """The loss of step `at` becomes NaN, through the weights' gradients as well."""
    forward, seen = JointLoss.forward, [0]

    def poisoned(self, batch, totals=None):
        losses = forward(self, batch, totals)
        seen[0] += self.training
        if seen[0] != at + 1 or not self.training:
            return losses
        return Losses(
            losses.loss * float("nan"), {n: v * float("nan") for n, v in losses.parts.items()}, losses.metrics
        )

    JointLoss.forward = poisoned


def infinite_gradient(at: int) -> None:
    """Step `at` has a finite loss and a gradient that is not."""
    forward, seen = JointLoss.forward, [0]

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def poisoned(self, batch, totals=None):
        losses = forward(self, batch, totals)
        seen[0] += self.training
        if seen[0] != at + 1 or not self.training:
            return losses
        return Losses(Explode.apply(losses.loss), losses.parts, losses.metrics)

    JointLoss.forward = poisoned


def unreadable_data(at: int) -> None:
    """The loader fails when step `at` is asked for."""
    steps = PretrainLoader.steps

    def failing(self, start, stop):
        for number, batches in enumerate(steps(self, start, stop), start):
            if number == at:
                raise ValueError("the table has gone")
            yield batches

    PretrainLoader.steps = failing


def killed_while_writing(at: int) -> None:
    """SIGKILL in the middle of the `at`-th file that a checkpoint writes, half of it on the disk."""
    write, count = checkpoint.write_durably, [0]

    def dying(path: Path, content: bytes) -> None:
        if path.suffix in (".safetensors", ".json") and path.parent.name.startswith(".writing-step"):
            if count[0] == at:
                path.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        write(path, content)

    checkpoint.write_durably = dying


def full_disk(at: int) -> None:
    """From step `at` on no file may grow past 20 kB: the operating system refuses, as a full disk does."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    before_step(limit)(at)


def killed_when_renaming(at: int) -> None:
    """SIGKILL when all files of the checkpoint of step `at` are written and it is not yet visible."""
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name.startswith(f".writing-step-{at:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = dying


FAULTS = {
    "killed": before_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "terminated": before_step(lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "hung_up": before_step(lambda: os.kill(os.getpid(), signal.SIGHUP)),
    "asleep": before_step(lambda: time.sleep(600)),
    "not_a_number": not_a_number,
    "infinite_gradient": infinite_gradient,
    "unreadable_data": unreadable_data,
    "killed_while_writing": killed_while_writing,
    "killed_when_renaming": killed_when_renaming,
    "full_disk": full_disk,
}


def train_until(argv: Sequence[str], end: int) -> int:
    """Train with SIGTERM to this process once step `end` has begun its successor: it saves after step `end`."""
    if int(os.environ["RANK"]) == 0:
        FAULTS["terminated"](end - 1)
    return train(argv)
