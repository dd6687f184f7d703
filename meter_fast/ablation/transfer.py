"""What is pre-training worth? `meter-fast train transfer size=tiny init=runs/demo data.root=SCENES`.

    meter-fast train transfer size=tiny init=runs/demo data.root=runs/demo/data seeds=0,1 processes=2
    meter-fast train transfer size=base init=runs/base hostfile=hostfile data.root=/data tasks=vqa,nlvr2

For each task and seed a model is fine-tuned from the pre-trained one and another, on the same budget, from scratch: at
size base from the encoders' own weights, at size tiny from random ones. Retrieval is scored without fine-tuning, too.
The same command goes on where it was stopped. RUN_DIR holds table.md, table.json and table.png; rows/ROW the runs.

tasks=, starts= and seeds= choose rows; processes=, hostfile= and settings of the trainer are as in `train ablation`; a
setting may be for one task alone, `nlvr2:run.max_steps=2000`. Exit codes: 0 all rows done, 75 asked to stop, 2 wrong
settings, 1 a row failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
from meter_fast.recipes.paper_tables import HELD_OUT, Size

ARGUMENTS = ("init", "size", "tasks", "starts", "seeds", "processes", "hostfile", "pictures")
PRETRAINED, SCRATCH, ZERO_SHOT = "pretrained", "scratch", "zero_shot"
STARTS = (PRETRAINED, SCRATCH, ZERO_SHOT)
SCORE = "score"
PICTURES: dict[Size, int | None] = {"base": None, "tiny": 200}
"""Of retrieval; None: all."""


@dataclass(frozen=True)
class Task:
    """recipe: by size. held_out: settings of its evaluation, by size. budget: settings of its miniature."""

    name: str
    recipe: dict[Size, str]
    held_out: dict[Size, tuple[str, ...]]
    budget: tuple[str, ...]


def _task(name: str, steps: int, *held_out: str) -> Task:
    budget = (f"run.max_steps={steps}", "run.max_epochs=0", "run.eval_every=0")
    return Task(name, {"tiny": name, "base": name}, {"tiny": held_out, "base": held_out}, budget)


RETRIEVAL = Task(
    "retrieval",
    {"tiny": "retrieval_coco", "base": "retrieval_f30k"},
    HELD_OUT,
    ("run.max_steps=400", "run.max_epochs=0", "run.eval_every=0"),
)
TASKS = {
    task.name: task
    for task in (
        _task("vqa", 300),
        _task("nlvr2", 200, "data.val_sources=arrow:nlvr2_test1"),
        _task("snli_ve", 200, "data.val_sources=arrow:snli_test"),
        RETRIEVAL,
    )
}
"""Each is scored on data that neither training nor the choice of a step has seen. The exception is VQAv2 at size base,
whose best step is chosen on part of val: its test has no public answers."""


@dataclass(frozen=True)
class TransferRow(PlannedRow):
    """start: pretrained, scratch or zero_shot, which has no seed."""

    task: str
    start: str
    seed: int | None


@dataclass(frozen=True)
class TransferPlan:
    size: Size
    init: str
    folder: Path
    rows: tuple[TransferRow, ...]
    launch: Launch


def make_transfer_plan(argv: Sequence[str]) -> TransferPlan:
    """The plan of a command line, `["size=tiny", "init=runs/demo", "data.root=DATA", ...]`, all settings resolved.
    Raises ConfigError."""
    arguments, overrides, folder = split_arguments("transfer", argv, ARGUMENTS, tuple(TASKS))
    size = one_of("size", arguments.get("size", "base"), tuple(PICTURES))
    init = arguments.get("init", "")
    if not Path(init).exists() or not init:
        raise ConfigError(f"init={init}: name a pre-trained model: a run directory, an export folder or a METER .ckpt")
    if Path(init, "export").is_dir():
        init = str(Path(init, "export"))
    tasks = several("tasks", arguments.get("tasks", ""), tuple(TASKS))
    starts = several("starts", arguments.get("starts", ""), STARTS)
    seeds = _seeds(arguments.get("seeds", "0"))
    pictures = count_of("pictures", arguments["pictures"], 2) if "pictures" in arguments else PICTURES[size]
    builder = _Builder(size, init, Path(folder or f"runs/transfer-{size}"), overrides, pictures)
    rows = [
        builder.row(TASKS[task], start, seed)
        for task in tasks
        for start in reversed(starts)  # what is quickest first
        for seed in ([None] if start == ZERO_SHOT else seeds)
        if start != ZERO_SHOT or task == RETRIEVAL.name
    ]
    if not rows:
        raise ConfigError(f"starts={','.join(starts)}: only retrieval is scored without fine-tuning")
    return TransferPlan(size, init, builder.folder, tuple(rows), launch_of(arguments))


def _seeds(value: str) -> list[int]:
    seeds = [count_of("seeds", part.strip(), 0) for part in value.split(",")]
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={value}: each once")
    return seeds


@dataclass(frozen=True)
class _Builder:
    """Makes the stages of rows."""

    size: Size
    init: str
    folder: Path
    overrides: list[tuple[str, str]]
    pictures: int | None

    def row(self, task: Task, start: str, seed: int | None) -> TransferRow:
        name = f"{task.name}-{start}" + ("" if seed is None else f"-{seed}")
        folder = self.folder / "rows" / name
        if seed is None:
            stages = (self._score(task, folder, self.init),)
        else:
            stages = (self._train(task, folder, start, seed), self._score(task, folder, folder / "train"))
        return TransferRow(name, folder, stages, task.name, start, seed)

    def _train(self, task: Task, folder: Path, start: str, seed: int) -> Stage:
        more = [text for name, text in self.overrides if name in ("", task.name)]
        settings = (*self._start(task, start), *(task.budget if self.size == "tiny" else ()), *more, f"run.seed={seed}")
        try:
            return training(folder, "train", task.recipe[self.size], (f"size={self.size}", *settings))
        except ConfigError as error:
            raise ConfigError(f"row {folder.name}: {error}") from None

    def _start(self, task: Task, start: str) -> tuple[str, ...]:
        if start == PRETRAINED:
            return (f"run.init={self.init}",)
        if self.size == "tiny":
            return ("data.tokenizer=trained",)
        return ("from_encoders=true",) if task.name == "vqa" else ()

    def _score(self, task: Task, folder: Path, model: Path | str) -> Stage:
        words = list(task.held_out[self.size])
        if model == self.init:  # a run that was fine-tuned knows where its data are
            words += [
                text for name, text in self.overrides if text.startswith("data.root=") and name in ("", task.name)
            ]
        if task is RETRIEVAL and self.pictures is not None:
            words += ["--pictures", str(self.pictures)]
        return evaluation(folder, SCORE, model, task.name, words)


def describe_transfer(plan: TransferPlan) -> list[str]:
    """The plan as lines for people."""
    lines = [
        f"fine-tuning from {plan.init} and from scratch, size {plan.size}",
        f"{len(plan.rows)} rows, {sum(len(row.stages) for row in plan.rows)} stages, into {plan.folder}",
    ]
    return lines + [f"  {row.name:<24} {', '.join(map(described, row.stages))}" for row in plan.rows]
