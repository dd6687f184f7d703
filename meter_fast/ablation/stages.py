"""Carries out planned rows: one stage after another, each in processes of its own, and goes on where it was stopped.

Knows commands, processes, signals and the files that say how a stage ended. Knows nothing of models or scores.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from meter_fast.ablation.rows import Launch, PlannedRow, Stage
from meter_fast.config import ConfigError
from meter_fast.launching import Starter, training_command
from meter_fast.training.interruption import EXIT_INTERRUPTED
from meter_fast.training.monitor import RUN_FILE, duration, replace_text

EXIT_DONE, EXIT_FAILED, EXIT_WRONG = 0, 1, 2
SHOWN = ("step ", "pictures ", "held out", "warning", "error", "stopped")
"""Beginnings of the lines of a stage's output that are passed on; all of it is in the log."""


def run_rows(
    rows: Sequence[PlannedRow], launch: Launch, folder: Path, said: Sequence[str], write: Callable[[], object]
) -> int:
    """Run what is not done yet, rows in order, and `write` the table into the folder after each. Returns the exit code.

    said: the plan for people. write leaves table.md in the folder, and what else there is.
    """
    try:
        check_done(rows)
        for planned in rows:
            planned.folder.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG
    say("\n".join(said))
    began, failed = time.monotonic(), []
    with Runner(launch) as runner:
        for number, planned in enumerate(rows, 1):
            ended = run_row(runner, planned, f"{number}/{len(rows)} {planned.name}")
            if ended == EXIT_INTERRUPTED:
                say("stopped; the same command goes on from here")
                return EXIT_INTERRUPTED
            if ended != EXIT_DONE:
                failed.append(planned.name)
            write()
    say((folder / "table.md").read_text(encoding="utf-8"))
    say(f"{len(rows) - len(failed)} of {len(rows)} rows done in {duration(time.monotonic() - began)}; "
        f"written to {folder}/table.md, table.json and table.png")  # fmt: skip
    if failed:
        say(f"failed: {', '.join(failed)}; the same command tries them again")
    return EXIT_FAILED if failed else EXIT_DONE


def say(text: str) -> None:
    print(text, flush=True)


def check_done(rows: Sequence[PlannedRow]) -> None:
    """Raise ConfigError where a finished stage is not the one that is asked for now: its scores would be mixed up."""
    for planned in rows:
        open_stage = None
        for stage in planned.stages:
            if not stage.done.is_file():
                open_stage = open_stage or stage.name
                continue
            before = tuple(json.loads(stage.done.read_text(encoding="utf-8"))["command"])
            if before != stage.command:
                lost, new = sorted(set(before) - set(stage.command)), sorted(set(stage.command) - set(before))
                raise ConfigError(
                    f"{stage.done} was done with other settings ({' '.join(lost) or 'fewer'} -> "
                    f"{' '.join(new) or 'fewer'}): name another run.dir, or remove {planned.folder}"
                )
            if open_stage is not None and stage.config is not None:
                raise ConfigError(
                    f"{stage.name} of row {planned.name} is done, {open_stage} before it is not: remove "
                    f"{planned.folder} to run the row anew"
                )


def run_row(runner: "Runner", planned: PlannedRow, title: str) -> int:
    """Run the row's stages until one does not end well. Returns its exit code."""
    for stage in planned.stages:
        if stage.done.is_file():
            say(f"[{title}, {stage.name}] done already")
            continue
        stage.failed.unlink(missing_ok=True)
        began = time.monotonic()
        code, message = runner.run(stage, f"[{title}, {stage.name}]")
        seconds = round(time.monotonic() - began, 1)
        if code == EXIT_INTERRUPTED:
            return code
        if code != EXIT_DONE:
            say(f"[{title}, {stage.name}] failed with code {code} ({stage.log}): {message}")
            replace_text(stage.failed, json.dumps({"code": code, "message": message}, indent=1) + "\n")
            return code
        replace_text(stage.done, json.dumps({"command": stage.command, **_took(stage, seconds)}, indent=1) + "\n")
    return EXIT_DONE


def _took(stage: Stage, seconds: float) -> dict:
    """How long the stage took, in training with the runs that it went on from."""
    path = stage.run_dir / RUN_FILE
    if stage.config is not None and path.is_file():
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    return {"seconds": seconds}


class Runner(Starter):
    """Starts stages and shows how far they are."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch

    def run(self, stage: Stage, title: str) -> tuple[int, str]:
        """Run a stage to its end. Returns (exit code, the line that says why if it is not 0); a stage that was stopped
        ends with 75, whatever its processes said."""
        if self.reason:
            return EXIT_INTERRUPTED, ""
        words, environment = command_of(stage, self.launch)
        say(f"{title} {' '.join(stage.command)}")
        last = ""
        with open(stage.log, "a", encoding="utf-8", errors="replace") as log:
            # A session of its own: Ctrl-C then reaches the stage once, from here.
            process = self.start(
                words, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            for line in process.stdout:  # ends when the last process of the stage has closed it
                log.write(line)
                log.flush()
                if line.startswith(SHOWN):
                    say(f"{title} {line.rstrip()}")
                if line.strip() and not ("error:" in last and "error:" not in line):
                    last = line.strip()
            code = process.wait()
        if self.reason or code == EXIT_INTERRUPTED:
            return EXIT_INTERRUPTED, ""
        return code, last


def command_of(stage: Stage, launch: Launch) -> tuple[list[str], dict[str, str]]:
    """(command line, environment) of a stage: evaluation in one process as it is, training as `launch` says."""
    if stage.config is not None:
        return training_command(stage.command[1:], launch.processes, launch.hostfile)
    _, environment = training_command((), 1, "")
    return [sys.executable, "-m", "meter_fast.cli", *stage.command], environment
