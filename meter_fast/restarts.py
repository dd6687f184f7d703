"""A run that is started again after a crash: `meter-fast train --max-restarts N RECIPE key=value ...`.

Knows processes, exit codes and what a run directory tells of how far a run came. Knows nothing of what is trained.

What is started again: a run that ended by a crash (exit code 1, a signal, a process that was killed). What is not: one
that is done (0), was asked to stop (75) or has wrong settings, data or files, a full disk included (2). It gives up

- when the restarts are used up;
- when the loss or gradient of the same step is not finite again: that is no accident;
- when a run came no further than the one before it: neither to a later step nor to a newer checkpoint.

Each restart meets at a free port of its own, and begins when every process of the crashed run on this host is gone.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from meter_fast.launching import Starter, training_command
from meter_fast.training import checkpoint
from meter_fast.training.interruption import EXIT_INTERRUPTED, SIGNALS
from meter_fast.training.monitor import METRICS_FILE
from meter_fast.training.resume import checkpoints_of

EXIT_FAILED = 1
FINAL = (0, 2, EXIT_INTERRUPTED)
ASKED = {code for n in SIGNALS for code in (-n, 256 - n, 128 + n)}  # of a launcher or a run that was told to end
GONE_SECONDS = 60.0  # the rest of a crashed run gets that long to end by itself


@dataclass(frozen=True)
class Failure:
    """How a run ended and how far it was: the last step that metrics.jsonl tells, the newest checkpoint, and the step
    whose numbers were not finite, if that was the cause."""

    cause: str
    step: int
    saved: int
    not_finite: int | None = None


def reason_to_give_up(before: Failure | None, now: Failure, restarts: int, most: int) -> str:
    """Why a run that failed as `now` is not started again, or "" where it is. before: the failure before it."""
    if before is not None and now.not_finite is not None and now.not_finite == before.not_finite:
        return f"step {now.not_finite} is not finite again, so it is no accident"
    if before is not None and now.saved <= before.saved and now.step <= before.step:
        return (
            f"no progress since the failure before: step {now.step} after {before.step}, newest checkpoint of step "
            f"{now.saved} as then. Where crashes come faster than checkpoints, lower run.save_every"
        )
    return f"{most} restarts are used up" if restarts >= most else ""


def train_with_restarts(arguments: Sequence[str], run_dir: Path, processes: int, hostfile: str, most: int) -> int:
    """Run the training until it ends for good. Returns its exit code: that of the last start, 75 where this process was
    asked to stop. arguments: recipe and settings."""
    before, restarts = None, 0
    with Starter() as starter:
        while True:
            reports = _reports(run_dir)
            words, environment = training_command(arguments, processes, hostfile)
            code = _run(starter, words, environment)
            if starter.reason or code in ASKED:
                return EXIT_INTERRUPTED
            if code in FINAL:
                return code
            now = _failure(code, run_dir, reports)
            where = f"the run ended at step {now.step}: {now.cause}"
            if reason := reason_to_give_up(before, now, restarts, most):
                _say(f"{where}. Not started again: {reason}")
                return code if 0 < code < 128 else EXIT_FAILED
            before, restarts = now, restarts + 1
            _say(f"{where}. Restart {restarts} of {most}, from {_origin(now)}")


def _origin(failure: Failure) -> str:
    return f"the checkpoint of step {failure.saved}" if failure.saved else "the beginning: there is no checkpoint"


def _failure(code: int, run_dir: Path, reports: dict[str, int]) -> Failure:
    """What the run directory and the exit code tell. reports: of numbers that are not finite, before this start."""
    new = [name for name, time in _reports(run_dir).items() if reports.get(name) != time]
    step = max((int(re.findall(r"\d+", name)[0]) for name in new), default=None)
    cause = f"step {step} is not finite" if step is not None else _meaning(code)
    saved = max(checkpoint.steps(checkpoints_of(run_dir)), default=0)
    return Failure(cause, _last_step(run_dir / METRICS_FILE), saved, step)


def _meaning(code: int) -> str:
    """Of an exit code: -9 of a process, 247 of the launcher whose process was killed by SIGKILL."""
    number = -code if code < 0 else 256 - code
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    return f"exit code {code}, its message is above"


def _last_step(metrics: Path) -> int:
    """Of a file whose last line may be torn."""
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    found = re.findall(r'"step": (\d+)', text.rpartition("\n")[0])
    return max(map(int, found), default=0)


def _reports(run_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run_dir.glob("not-finite-step-*.json")}


def _say(text: str) -> None:
    print(f"meter-fast train: {text}", file=sys.stderr, flush=True)


def _run(starter: Starter, words: Sequence[str], environment: dict[str, str]) -> int:
    """The exit code of a run, when all of its processes on this host are gone."""
    process = starter.start(words, environment)
    family: set[psutil.Process] = set()
    while True:
        family |= _descendants(process.pid)
        try:
            code = process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            continue
    saves = bool(starter.reason) or code == EXIT_INTERRUPTED or code in ASKED
    _, left = psutil.wait_procs(family, timeout=None if saves else GONE_SECONDS)
    for one in left:  # of a crashed run, and would write into the folder of the next one
        one.kill()
    psutil.wait_procs(left)
    return code


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()
