"""What is to be done for a table: rows, their stages, and the command of each. Checked as a whole before any is run.

Knows the paper's tables and the recipes. Knows nothing of processes, scores or pages.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meter_fast.config import ConfigError, RunConfig
from meter_fast.recipes import resolve
from meter_fast.recipes.paper_tables import HELD_OUT, LENGTHS, PICTURES, TABLES, Row, Size, Table

TRAINING = ("image_tokenizer", "pretrain", "vqa")
CHOOSABLE = ("pretrain", "retrieval", "vqa")
ARGUMENTS = ("table", "figure", "size", "rows", "stages", "processes", "hostfile", "pictures")
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
    row: Row
    folder: Path
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Plan:
    """processes: of every training stage (None: one for each GPU); hostfile: of DeepSpeed, or empty."""

    table: Table
    size: Size
    folder: Path
    rows: tuple[PlannedRow, ...]
    processes: int | None
    hostfile: str
    common: dict[str, tuple[str, ...]] = field(default_factory=dict)


def make_plan(argv: Sequence[str]) -> Plan:
    """The plan of a command line, `["table=7", "size=tiny", "data.root=DATA", ...]`.

    Every training stage's settings are resolved here, so that what is wrong with the last row is told before the first
    is run. Raises ConfigError.
    """
    arguments, overrides, folder = _split(argv)
    table = _table(arguments)
    size = _one_of("size", arguments.get("size", "base"), tuple(LENGTHS))
    rows = _rows(table, arguments.get("rows", ""))
    stages = _several("stages", arguments.get("stages", ""), CHOOSABLE)
    pictures = _count("pictures", arguments["pictures"], 2) if "pictures" in arguments else PICTURES[size]
    processes = _count("processes", arguments["processes"], 1) if "processes" in arguments else None
    hostfile = arguments.get("hostfile", "")
    if hostfile and not Path(hostfile).is_file():
        raise ConfigError(f"hostfile={hostfile}: there is no such file; one line a node, for example: node1 slots=8")
    if hostfile and processes is not None:
        raise ConfigError(f"hostfile={hostfile} tells how many processes each node has: leave out processes=")
    folder = Path(folder or f"runs/{table.name}-{size}")
    common = {
        "pretrain": LENGTHS[size].get("pretrain", ()),
        "image_tokenizer": LENGTHS[size].get("image_tokenizer", ()),
        "vqa": LENGTHS[size].get("vqa" if table.pretrained else "from_encoders", ()),
    }
    builder = _Builder(table, size, folder, common, overrides, pictures, stages)
    planned = tuple(row for row in map(builder.row, rows) if row.stages)
    if not planned:
        raise ConfigError(f"stages={','.join(stages)}: table={table.name} has none of these; its rows are fine-tuned")
    return Plan(table, size, folder, planned, processes, hostfile, common)


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """Arguments of the ablation, settings to pass on as (stage or "", key=value), and run.dir."""
    arguments: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    folder = ""
    for text in argv:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r}: settings are written key=value")
        stage, colon, rest = key.rpartition(":")
        if key in ARGUMENTS:
            arguments[key] = value
        elif key == "run.dir":
            folder = value
        elif colon and stage not in TRAINING:
            raise ConfigError(f"{text}: {stage} is no stage that trains; one of {', '.join(TRAINING)}")
        elif rest in OWN:
            raise ConfigError(f"{text}: the stages set {rest} themselves; run.dir=FOLDER names the folder of the table")
        elif "." not in rest:
            near = difflib.get_close_matches(rest, ARGUMENTS, n=1)
            hint = f"did you mean {near[0]}=? " if near else ""
            raise ConfigError(f"unknown argument {rest!r}: {hint}arguments of ablation are {', '.join(ARGUMENTS)}")
        else:
            overrides.append((stage, f"{rest}={value}"))
    return arguments, overrides, folder


def _table(arguments: Mapping[str, str]) -> Table:
    """By name, table=fusion, or by its number in the paper, table=7 or figure=5."""
    if len({"table", "figure"} & set(arguments)) == 2:
        raise ConfigError(f"table={arguments['table']} figure={arguments['figure']}: give one of them")
    key = "figure" if "figure" in arguments else "table"
    value = arguments.get(key, "")
    for table in TABLES.values():
        if f"{key} {value}" == table.number or value == table.name:
            return table
    known = "; ".join(f"{t.number.replace(' ', '=')} ({t.name}: {t.title.split(' (')[0]})" for t in TABLES.values())
    raise ConfigError(f"{key}={value}: one of {known}")


def _one_of(key: str, value: str, choices: tuple[str, ...], said: str = "") -> str:
    if value not in choices:
        raise ConfigError(f"{key}={value}: one of {said or ', '.join(choices)}")
    return value


def _several(key: str, value: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The named ones in the order of `choices`; all for an empty value."""
    named = [part.strip() for part in value.split(",") if part.strip()] or list(choices)
    for name in named:
        _one_of(key, name, choices)
    return tuple(name for name in choices if name in named)


def _rows(table: Table, value: str) -> tuple[Row, ...]:
    names = _several("rows", value, tuple(row.name for row in table.rows))
    rows = tuple(row for row in table.rows if row.name in names)
    for row in rows:
        if row.start and row.start not in names:
            raise ConfigError(
                f"rows={value}: {row.name} starts from the pre-training of {row.start}; name that row, too"
            )
    return rows


def _count(key: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{key}={value}: a whole number, {least} or more")
    return int(value)


@dataclass(frozen=True)
class _Builder:
    """Makes the stages of rows."""

    table: Table
    size: Size
    folder: Path
    common: dict[str, tuple[str, ...]]
    overrides: list[tuple[str, str]]
    pictures: int | None
    stages: tuple[str, ...]

    def row(self, row: Row) -> PlannedRow:
        """The row with those of its stages that were asked for."""
        folder, change = self.folder / "rows" / row.name, row.change(self.size)
        start = self.folder / "rows" / (row.start or row.name) / "pretrain"
        stages: list[Stage] = []
        if self.table.pretrained and not row.start:
            stages += self._pretraining(row, folder, (*change.model, *change.pretrain))
        if "vqa" in self.stages:
            init = (f"run.init={start / 'export'}",) if self.table.pretrained else ()
            stages.append(self._train(row, folder, "vqa", (*change.model, *change.vqa), init))
            stages.append(self._evaluate(folder, "vqa_score", folder / "vqa", "vqa"))
        return PlannedRow(row, folder, tuple(stages))

    def _pretraining(self, row: Row, folder: Path, change: tuple[str, ...]) -> list[Stage]:
        """Pre-training, before it the image tokenizer if an objective needs one, after it retrieval if ITM is there."""
        tokenizer = any(text.startswith("objectives.names=") and "mim_codes" in text for text in change)
        if any(text.startswith("objectives.image_tokenizer=") for _, text in self.overrides):
            tokenizer = False  # the one that is named there
        made = (f"objectives.image_tokenizer={folder / 'image_tokenizer' / 'export'}",) if tokenizer else ()
        pretrain = self._train(row, folder, "pretrain", change, made)
        stages = [self._tokenizer(row, folder, pretrain.config.model.vision.grid)] if tokenizer else []
        stages.append(pretrain)
        if "retrieval" in self.stages and "itm" in pretrain.config.objectives.names:
            more = () if self.pictures is None else ("--pictures", str(self.pictures))
            stages.append(
                self._evaluate(folder, "retrieval", folder / "pretrain", "retrieval", HELD_OUT[self.size], more)
            )
        return stages

    def _tokenizer(self, row: Row, folder: Path, grid: int) -> Stage:
        """Training of an image tokenizer that gives one code for each cell of the pictures."""
        plain = self._train(row, folder, "image_tokenizer", ())
        side = f"image_tokenizer.image_size={plain.config.image_tokenizer.factor * grid}"
        return self._train(row, folder, "image_tokenizer", (side,))

    def _train(self, row: Row, folder: Path, name: str, change: tuple[str, ...], given: tuple[str, ...] = ()) -> Stage:
        mine = {text.partition("=")[0] for text in change}
        more = [text for stage, text in self.overrides if stage in ("", name)]
        for text in more:
            if text.partition("=")[0] in mine:
                raise ConfigError(f"{text}: the rows of table={self.table.name} differ in that setting; leave it out")
        settings = (f"size={self.size}", *self.common[name], *change, *more, *given, f"run.dir={folder / name}")
        try:
            config = resolve([name, *settings])
        except ConfigError as error:
            raise ConfigError(f"row {row.name}, stage {name}: {error}") from None
        return Stage(name, folder, ("train", name, *settings), config)

    def _evaluate(
        self,
        folder: Path,
        name: str,
        model: Path,
        task: str,
        settings: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
    ) -> Stage:
        command = ("evaluate", str(model), task, *settings, *more, "--json", str(folder / f"{name}.json"))
        return Stage(name, folder, command)


def describe(plan: Plan) -> list[str]:
    """The plan as lines for people."""
    count = sum(len(row.stages) for row in plan.rows)
    lines = [
        f"{plan.table.name}, size {plan.size}: {plan.table.title} ({plan.table.number} of the paper)",
        f"{len(plan.rows)} rows, {count} stages, into {plan.folder}",
    ]
    used = {stage.name for row in plan.rows for stage in row.stages}
    lines += [f"  every {name:<16} {' '.join(text)}" for name, text in plan.common.items() if text and name in used]
    for planned in plan.rows:
        change = planned.row.change(plan.size)
        own = " ".join((*change.model, *change.pretrain, *(f"vqa:{text}" for text in change.vqa)))
        lines.append(f"  {planned.row.name:<22} {own or 'as the recipe has it'}")
        lines.append(f"  {'':<22} {', '.join(_described(stage) for stage in planned.stages)}")
    return lines


def _described(stage: Stage) -> str:
    length = f" {stage.config.run.max_steps:,} steps" if stage.config is not None and stage.config.run.max_steps else ""
    return f"{stage.name}{length}{' (done)' if stage.done.is_file() else ''}"
