"""Rows of a comparison, the stages of each, and the words of the command line that all comparisons understand.

Knows settings as text and recipes. Knows nothing of tables, processes or scores.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meter_fast.config import ConfigError, RunConfig
from meter_fast.recipes import resolve

OWN = ("run.dir", "run.init", "run.resume")
"""Settings that the stages set themselves."""


@dataclass(frozen=True)
class Stage:
    """One command of a row. command: the words after `meter-fast`; config: of a training stage, resolved."""

    name: str
    folder: Path
    command: tuple[str, ...]
    config: RunConfig | None = None

    @property
    def run_dir(self) -> Path:
        """Where a training stage leaves its run."""
        return self.folder / self.name

    @property
    def scores(self) -> Path:
        """What an evaluation writes."""
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def done(self) -> Path:
        """Written when the stage has ended well: its command and how long it took."""
        return self.folder / f"{self.name}.done.json"

    @property
    def failed(self) -> Path:
        """Written when it has not: the message."""
        return self.folder / f"{self.name}.failed.json"


@dataclass(frozen=True)
class PlannedRow:
    """name: of the row and of its folder."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Launch:
    """processes: of every training stage (None: one for each GPU); hostfile: of DeepSpeed, or empty."""

    processes: int | None = None
    hostfile: str = ""


def training(folder: Path, name: str, recipe: str, settings: Sequence[str]) -> Stage:
    """A run of the trainer, its settings resolved. Raises ConfigError."""
    words = (*settings, f"run.dir={folder / name}")
    return Stage(name, folder, ("train", recipe, *words), resolve([recipe, *words]))


def evaluation(folder: Path, name: str, model: Path | str, task: str, words: Iterable[str] = ()) -> Stage:
    """An evaluation whose scores the stage keeps. words: settings, then options."""
    command = ("evaluate", str(model), task, *words, "--json", str(folder / f"{name}.json"))
    return Stage(name, folder, command)


def split_arguments(
    command: str, argv: Sequence[str], arguments: Sequence[str], stages: Sequence[str]
) -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """(arguments of the comparison, settings to pass on as (stage or "", key=value), run.dir or "").

    stages: the names that may stand before a setting, `vqa:run.max_steps=100`. Raises ConfigError.
    """
    found: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    folder = ""
    for text in argv:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r}: settings are written key=value")
        stage, colon, rest = key.rpartition(":")
        if key in arguments:
            found[key] = value
        elif key == "run.dir":
            folder = value
        elif colon and stage not in stages:
            raise ConfigError(f"{text}: {stage} is no stage that trains; one of {', '.join(stages)}")
        elif rest in OWN:
            raise ConfigError(f"{text}: the stages set {rest} themselves; run.dir=FOLDER names the folder of the table")
        elif "." not in rest:
            near = difflib.get_close_matches(rest, arguments, n=1)
            hint = f"did you mean {near[0]}=? " if near else ""
            raise ConfigError(f"unknown argument {rest!r}: {hint}arguments of {command} are {', '.join(arguments)}")
        else:
            overrides.append((stage, f"{rest}={value}"))
    return found, overrides, folder


def launch_of(arguments: Mapping[str, str]) -> Launch:
    """Of processes= and hostfile=. Raises ConfigError."""
    processes = count_of("processes", arguments["processes"], 1) if "processes" in arguments else None
    hostfile = arguments.get("hostfile", "")
    if hostfile and not Path(hostfile).is_file():
        raise ConfigError(f"hostfile={hostfile}: there is no such file; one line a node, for example: node1 slots=8")
    if hostfile and processes is not None:
        raise ConfigError(f"hostfile={hostfile} tells how many processes each node has: leave out processes=")
    return Launch(processes, hostfile)


def one_of(key: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(f"{key}={value}: one of {', '.join(choices)}")
    return value


def several(key: str, value: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The named ones in the order of `choices`; all for an empty value."""
    named = [part.strip() for part in value.split(",") if part.strip()] or list(choices)
    for name in named:
        one_of(key, name, choices)
    return tuple(name for name in choices if name in named)


def count_of(key: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{key}={value}: a whole number, {least} or more")
    return int(value)


def described(stage: Stage) -> str:
    """The stage in a few words, for people."""
    length = f" {stage.config.run.max_steps:,} steps" if stage.config is not None and stage.config.run.max_steps else ""
    return f"{stage.name}{length}{' (done)' if stage.done.is_file() else ''}"
