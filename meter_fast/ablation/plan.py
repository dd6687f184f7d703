"""What is to be done for a table: rows, their stages, and the command of each. Checked as a whole before any is run.

Knows the paper's tables and the recipes. Knows nothing of processes, scores or pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meter_fast.ablation.rows import (
    Launch,
    PlannedRow,
    Stage,
    count_of,
    described,
    evaluation,
    launch_of,
    one_of,
    several,
    split_arguments,
    training,
)
from meter_fast.config import ConfigError
from meter_fast.recipes.paper_tables import HELD_OUT, LENGTHS, PICTURES, TABLES, Row, Size, Table

TRAINING = ("image_tokenizer", "pretrain", "vqa")
CHOOSABLE = ("pretrain", "retrieval", "vqa")
ARGUMENTS = ("table", "figure", "size", "rows", "stages", "processes", "hostfile", "pictures")


@dataclass(frozen=True)
class Plan:
    """The rows that are asked for, of a table at a size. common: settings of a stage in every row."""

    table: Table
    size: Size
    folder: Path
    rows: tuple[PlannedRow, ...]
    launch: Launch
    common: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The table's row of a planned one."""
        return next(row for row in self.table.rows if row.name == name)


def make_plan(argv: Sequence[str]) -> Plan:
    """The plan of a command line, `["table=7", "size=tiny", "data.root=DATA", ...]`.

    Every training stage's settings are resolved here, so that what is wrong with the last row is told before the first
    is run. Raises ConfigError.
    """
    arguments, overrides, folder = split_arguments("ablation", argv, ARGUMENTS, TRAINING)
    table = _table(arguments)
    size = one_of("size", arguments.get("size", "base"), tuple(LENGTHS))
    rows = _rows(table, arguments.get("rows", ""))
    stages = several("stages", arguments.get("stages", ""), CHOOSABLE)
    pictures = count_of("pictures", arguments["pictures"], 2) if "pictures" in arguments else PICTURES[size]
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
    return Plan(table, size, folder, planned, launch_of(arguments), common)


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


def _rows(table: Table, value: str) -> tuple[Row, ...]:
    names = several("rows", value, tuple(row.name for row in table.rows))
    rows = tuple(row for row in table.rows if row.name in names)
    for row in rows:
        if row.start and row.start not in names:
            raise ConfigError(
                f"rows={value}: {row.name} starts from the pre-training of {row.start}; name that row, too"
            )
    return rows


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
            stages.append(evaluation(folder, "vqa_score", folder / "vqa", "vqa"))
        return PlannedRow(row.name, folder, tuple(stages))

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
            words = (*HELD_OUT[self.size], *more)
            stages.append(evaluation(folder, "retrieval", folder / "pretrain", "retrieval", words))
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
        settings = (f"size={self.size}", *self.common[name], *change, *more, *given)
        try:
            return training(folder, name, name, settings)
        except ConfigError as error:
            raise ConfigError(f"row {row.name}, stage {name}: {error}") from None


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
        change = plan.row(planned.name).change(plan.size)
        own = " ".join((*change.model, *change.pretrain, *(f"vqa:{text}" for text in change.vqa)))
        lines.append(f"  {planned.name:<22} {own or 'as the recipe has it'}")
        lines.append(f"  {'':<22} {', '.join(map(described, planned.stages))}")
    return lines
