"""Do one step of a run again, to look at a loss that leapt or was not finite.

    meter-fast replay runs/base 1200
    deepspeed --num_gpus 8 --module meter_fast.replay runs/base 1200

Starts from the newest whole checkpoint before the step, does the steps between as the run did, and prints what the step
read and gave: the same losses, bit for bit, with the run's number of processes on the same kind of device. Writes
nothing into the run directory. Exit codes: 0 as recorded, or nothing was recorded of that step alone; 1 otherwise.
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from meter_fast.config import RunConfig, from_dict
from meter_fast.models.files import read_json
from meter_fast.train import leave
from meter_fast.training import checkpoint, world
from meter_fast.training.checkpoint import CheckpointError
from meter_fast.training.monitor import METRICS_FILE, read_metrics
from meter_fast.training.progress import exchange
from meter_fast.training.record import StepRecord
from meter_fast.training.resume import checkpoints_of
from meter_fast.training.run import Run, prepare

EXIT_SAME, EXIT_DIFFERENT, EXIT_WRONG = 0, 1, 2


def replay(run_dir: Path, step: int) -> int:
    """Do step `step` (from 1, as in metrics.jsonl) again and print it. Collective. Returns the exit code; raises
    ValueError or OSError where the run cannot be opened."""
    config = from_dict(RunConfig, read_json(run_dir / "config.json"))
    if not 1 <= step <= config.run.max_steps:
        raise ValueError(f"step {step}: {run_dir} has steps 1 to {config.run.max_steps}")
    with tempfile.TemporaryDirectory() as elsewhere:
        if (run_dir / "tokenizer").is_dir():  # of data.tokenizer=trained
            shutil.copytree(run_dir / "tokenizer", Path(elsewhere) / "tokenizer")
        options = replace(config.run, dir=elsewhere, resume=_before(run_dir, step), eval_every=0, picture_every=0)
        run = prepare(replace(config, run=options), world.start(config.run.hang_seconds))
        try:
            record, odd = _steps(run, step)
            return _show(run, record, odd, run_dir)
        finally:
            run.monitor.close()
            run.pairs.close()


def _before(run_dir: Path, step: int) -> str:
    """The newest whole checkpoint of an earlier step, or "never" where the run has to be done from its beginning."""
    folder = checkpoints_of(run_dir)
    for found in reversed(checkpoint.steps(folder)):
        if found < step:
            with contextlib.suppress(CheckpointError):
                checkpoint.verify(checkpoint.path_of(folder, found))
                return str(checkpoint.path_of(folder, found))
    return "never"


def _steps(run: Run, last: int) -> tuple[StepRecord, list[str]]:
    """The record of step `last` and, where something in it is not finite, the first module that gave it."""
    with contextlib.closing(run.pairs.loader.steps(run.start.step, last)) as steps:
        for step in range(run.start.step, last):
            batches = next(steps)
            counts = exchange(run.world, run.engine.objectives, batches, None, False, False).counts
            with watched(run.engine.module, step == last - 1) as odd:
                record = run.engine.step(step, batches, counts)
    return record, odd


@contextlib.contextmanager
def watched(module: nn.Module, on: bool = True) -> Iterator[list[str]]:
    """Meanwhile, the names of submodules whose output is not finite, in the order in which they gave it."""
    odd: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            found = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(one, Tensor) and not torch.isfinite(one).all() for one in found):
                odd.append(name)

        return hook

    hooks = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name and on]
    try:
        yield odd
    finally:
        for hook in hooks:
            hook.remove()


def _show(run: Run, record: StepRecord, odd: list[str], run_dir: Path) -> int:
    names, step = run.engine.objectives, record.step + 1
    news = exchange(run.world, names, [], record, False, False)
    mine = [{"losses": record.losses(i), "samples": ids.tolist()} for i, ids in enumerate(record.sample_ids)]
    everyone = run.world.share([mine, odd[:1]])
    count = run.engine.accumulation * run.world.size
    loss = {name: news.losses[name] / count for name in names}
    lines = [f"step {step}: {loss}, gradient norm {news.grad_norm!r}"]
    for rank, (parts, first) in enumerate(everyone):
        lines += [f"  rank {rank}, micro-batch {i}: {one['losses']}, samples {one['samples']}"
                  for i, one in enumerate(parts)]  # fmt: skip
        lines += [f"  rank {rank}: the first module whose output is not finite is {name}" for name in first]
    rows = read_metrics(run_dir / METRICS_FILE) if run.world.is_main and (run_dir / METRICS_FILE).is_file() else []
    said = run.world.hear(next((row for row in rows if row["step"] == step and "loss" in row), None))
    code = EXIT_SAME
    if said is None or run.config.run.log_every > 1:
        lines.append("  metrics.jsonl has no line of this step alone: nothing to compare with")
    elif all(said["loss"].get(name) == loss[name] for name in names):
        lines.append("  as recorded in metrics.jsonl, bit for bit")
    else:
        lines.append(f"  recorded: {said['loss']}")
        code = EXIT_DIFFERENT
    run.monitor.message("\n".join(lines))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """RUN STEP. Returns the exit code; messages go to standard error."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
    try:
        if len(words) != 2 or not words[1].isdecimal():
            raise ValueError("give a run directory and the number of a step")
        return replay(Path(words[0]), int(words[1]))
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG


if __name__ == "__main__":
    leave(main())
