"""What the ranks of a test run: training with a record of what each step saw and with the faults asked for."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import faults

from meter_fast import train as program
from meter_fast.training.engine import Engine


def train(argv: Sequence[str], fault: str = "") -> int:
    """meter_fast.train in this process. fault: as faults.py says.

    Each step's sample ids go to run.dir/samples-RANK.jsonl."""
    rank = int(os.environ["RANK"])
    run_dir = next(Path(a.partition("=")[2]) for a in argv if a.startswith("run.dir="))
    watch_samples(run_dir / f"samples-{rank}.jsonl")
    if fault:
        faults.install(fault)
    return program.main(argv)


def watch_samples(path: Path) -> None:
    """Note the sample ids of each step, by micro-batch."""
    step_of = Engine.step

    def step(self, step, batches, counts):
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "samples": [b.sample_ids.tolist() for b in batches]}) + "\n")
        return step_of(self, step, batches, counts)

    Engine.step = step


def train_until(argv: Sequence[str], end: int) -> int:
    """Train with SIGTERM to this process once step `end` has begun its successor: it saves after step `end`."""
    return train(argv, fault=f"term@step={end - 1}")


def train_at(argv: Sequence[str], port: int) -> int:
    """meter_fast.train, to meet at a port of the test's choice."""
    os.environ["MASTER_PORT"] = str(port)
    return program.main(argv)


def replay(run: str, step: int) -> int:
    """meter_fast.replay in this process."""
    from meter_fast.replay import main

    return main([run, str(step)])


def meet(folder: str, slow: int) -> int:
    """Join the world and note when, in folder/RANK. Rank `slow` needs a second more, and notes when it was through."""
    from torch import distributed as dist

    from meter_fast.training import world

    rank, join = int(os.environ["RANK"]), dist.init_process_group

    def join_slowly(*arguments, **options):
        join(*arguments, **options)
        time.sleep(1)
        Path(folder, str(rank)).write_text(str(time.monotonic()))

    if rank == slow:
        dist.init_process_group = join_slowly
        world.start(60)
    else:
        world.start(60)
        Path(folder, str(rank)).write_text(str(time.monotonic()))
    return 0
