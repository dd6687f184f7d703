"""Score a model on held-out data: `meter-fast evaluate MODEL TASK key=value ...`, or with several processes

    deepspeed --module meter_fast.evaluate MODEL pretrain|vqa|nlvr2|snli_ve|caption|retrieval key=value ...
    torchrun --nproc-per-node 8 --module meter_fast.evaluate MODEL vqa data.root=DATA --submission FILE.json

The scores of the training objectives are made here: loss and accuracy over a split, on any number of ranks. Batches are
cut as for one process and dealt to all, so scores do not depend on their number; the main process prints and writes.
Knows objectives, loaders and where a model's settings lie. What single words and captions tell is in `score`.
"""

import contextlib
import io
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meter_fast
from meter_fast.config import FINE_TUNING, DataConfig, RunConfig, from_dict, override
from meter_fast.data.batch import Batch
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.loader import EvaluationLoader
from meter_fast.data.sources import PUBLISHED, open_sources
from meter_fast.data.spans import open_denoiser
from meter_fast.data.statement_tables import TASKS
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.models.files import read_json
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import OBJECTIVES, JointLoss
from meter_fast.recipes import resolve
from meter_fast.training import slurm
from meter_fast.training.masked_images import open_cells
from meter_fast.training.versions import versions
from meter_fast.training.world import StoppedTogether, World, alone, start

NO_BATCH = "evaluation: the held-out split gave no batch"
PATIENCE = 6 * 3600  # seconds that a process waits for the slowest; of one that ended it hears at once


@torch.inference_mode()
def evaluate_pretraining(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Mean loss and accuracy of each objective over a split: {"mlm": {"loss", "accuracy", "count"}, "itm": {...}}.

    model: a `JointLoss`, put in eval mode meanwhile. batches: this rank's share, as many as every other rank has (an
    `EvaluationLoader`). Sums are added over the ranks, so all ranks return the same numbers: MLM averages over all
    masked tokens of the split, ITM over all its pairs. Raises ValueError for no batch.
    """
    sums = {name: rows.sum(0) for name, rows in objective_rows(model, batches, device, dtype).items()}
    if not sums:
        raise ValueError(NO_BATCH)
    return {name: _means(_over_ranks(row).tolist()) for name, row in sums.items()}


@torch.inference_mode()
def objective_rows(
    model: nn.Module, batches: Iterable[Batch], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """By objective, of each of this process's n batches summed loss, right ones and count: [n,3] float64."""
    was_training = model.training
    model.eval()
    rows: dict[str, list[Tensor]] = {}
    try:
        for batch in batches:
            losses = model(batch.to(device, dtype))
            for name, (correct, count) in losses.metrics.items():
                row = torch.stack([losses.parts[name].double() * count, correct.double(), count.double()])
                rows.setdefault(name, []).append(row)
    finally:
        model.train(was_training)
    return {name: torch.stack(own) for name, own in rows.items()}


def _over_ranks(row: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(row)
    return row


def _means(row: Sequence[float]) -> dict[str, float]:
    loss, correct, count = row
    return {"loss": loss / max(count, 1.0), "accuracy": correct / max(count, 1.0), "count": int(count)}


def evaluate_split(
    model_path: str | Path,
    task: str,
    settings: Sequence[str] = (),
    pairs: int | None = None,
    device: str | None = None,
    world: World | None = None,
    submission: str | Path | None = None,
    annotations: str | Path | None = None,
) -> dict:
    """Score the model at `model_path` (run directory, export folder or METER .ckpt) on held-out pairs or questions.

    task: "pretrain", "vqa" (see `evaluate_questions`), "nlvr2" or "snli_ve" (`evaluate_statements`). settings:
    "data.root=FOLDER" and the like, over the run's own or, for a model without a run, over the recipe's;
    `held_out_names` says what is scored, of data.val_split. pairs: at most so many. world: the processes that do it
    together, each a part; all of them call this and get the same scores, which are those of one process. submission: of
    questions the file that the evaluation server reads, of statements one of their judgements. annotations: of nlvr2,
    the official file that names them.

    Returns the scores by objective as `evaluate_pretraining` gives them, {"split", "tables", "pairs", "skipped"} and
    `facts`. Raises ValueError where something is missing or does not fit.
    """
    path, world = Path(model_path), world or alone(device or here())
    if task == "vqa":
        from meter_fast.evaluate_vqa import evaluate_questions  # which reads this module

        scores = evaluate_questions(path, settings, pairs, world, submission)
    elif task in TASKS:
        from meter_fast.evaluate_statements import evaluate_statements

        scores = evaluate_statements(path, task, settings, pairs, world, submission, annotations)
    else:
        scores = _evaluate_pairs(path, settings, pairs, world)
    return {**scores, **facts(path, task, world)}


def lines(scores: Mapping) -> list[str]:
    """The scores of `evaluate_split` for people."""
    said = [
        f"{name}  loss {row['loss']:.4f}  accuracy {100 * row['accuracy']:.2f} %  of {row['count']:,}"
        for name, row in scores.items()
        if isinstance(row, dict) and "accuracy" in row
    ]
    for kind, row in scores.get("vqa", {}).items():
        other = "" if row["exchanged"] is None else f"  with other pictures {100 * row['exchanged']:.2f} %"
        said.append(f"vqa {kind:<15}  score {100 * row['score']:.2f} %{other}  of {row['count']:,}")
    for label, row in scores.get(scores["task"], {}).items() if scores["task"] in TASKS else ():
        other = "" if row["exchanged"] is None else f"  with other pictures {100 * row['exchanged']:.2f} %"
        chance = f"  chance {100 * row['chance']:.2f} %" if "chance" in row else ""
        said.append(
            f"{scores['task']} {label:<13}  accuracy {100 * row['accuracy']:.2f} %{other}{chance}  of {row['count']:,}"
        )
    noun = {"vqa": "questions", "nlvr2": "statements", "snli_ve": "hypotheses"}.get(scores["task"], "pairs")
    said.append(f"split {scores['split']}, {scores['pairs']:,} {noun}, skipped {scores['skipped'] or 'none'}")
    made = scores.get("submission")
    if made is not None:
        what, verb = ("answers", "asked") if scores["task"] == "vqa" else ("judgements", "judged")
        filled = f"; {made['filled']:,} could not be {verb}, with {made['filled_with']!r}" if made["filled"] else ""
        said.append(f"{made['file']}: {made.get('questions', made.get('statements')):,} {what}{filled}")
    return said


def here() -> str:
    """The device of a process that is alone."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def facts(path: Path, task: str, world: World) -> dict:
    """What a scores file says besides scores and split: model, task, how many processes, versions."""
    return {"model": str(path), "task": task, "world_size": world.size, "versions": versions()}


def _evaluate_pairs(path: Path, settings: Sequence[str], limit: int | None, world: World) -> dict:
    """`evaluate_split` for the objectives of pre-training."""
    own, told = world.each(lambda: _score_pairs(path, settings, limit, world))
    shared = world.share({name: rows.tolist() for name, rows in own.items()})
    names = list(dict.fromkeys(name for rows in shared for name in rows))
    if not names:
        raise ValueError(NO_BATCH)
    columns = {name: zip(*(row for rows in shared for row in rows.get(name, ())), strict=True) for name in names}
    # Sums that are rounded once do not depend on which process gave what.
    scores = {name: _means([math.fsum(column) for column in columns[name]]) for name in names}
    return {**scores, **told, "skipped": skipped_by_all(world, told["skipped"])}


def _score_pairs(path: Path, settings: Sequence[str], limit: int | None, world: World) -> tuple[dict, dict]:
    """This process's `objective_rows`, and what is said of the split."""
    model = meter_fast.load_model(path)
    config = override(settings_of(path, "pretrain"), settings)
    data, objectives = config.data, config.objectives
    check_heads(path, model, objectives.names)
    transform = image_transform(data.transform, model.config.vision.image_size)
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    length = min(data.max_text_length, model.config.text.max_length)
    denoiser = open_denoiser(tokenizer, objectives.names, objectives.span_probability, objectives.span_length)
    text = TextPipeline(tokenizer, length, objectives.masking, objectives.mlm_probability, denoiser)
    names, said = held_out_names(data, data.val_split)
    sources = open_sources(names, data.root, data.val_split)
    backend = open_backend(data.backend, transform, world.device, torch.float32, max_batch=config.engine.micro_batch)
    try:
        loader = EvaluationLoader(
            sources,
            text,
            backend,
            batch_size=config.engine.micro_batch,
            limit=limit,
            seed=config.run.seed,
            workers=data.workers,
            max_bad_share=data.max_bad_share,
            max_image_pixels=data.max_image_pixels,
            cells=open_cells(objectives, model.config.vision, transform, world.device),
        ).dealt(world.rank, world.size)
        rows = objective_rows(JointLoss(model.to(world.device), objectives.names), loader, world.device)
    finally:
        backend.close()
    count = len(sources) if limit is None else min(limit, len(sources))
    return rows, {"split": said, "tables": sources.files, "pairs": count, "skipped": dict(loader.skipped)}


def skipped_by_all(world: World, own: Mapping[str, int]) -> dict[str, int]:
    """Samples left out by all processes, by cause. Collective."""
    return dict(sum(map(Counter, world.share(dict(own))), Counter()))


def check_heads(path: Path, model: Meter, objectives: Sequence[str]) -> None:
    """Raise ValueError where the model has not what one of the objectives needs."""
    lacking = [name for name in objectives if getattr(model, OBJECTIVES[name].HEAD) is None]
    if not lacking:
        return
    able = {task: getattr(model, OBJECTIVES[task].HEAD) is not None for task in ("vqa", *TASKS, "caption")}
    commands = [f"meter-fast evaluate {path} {task}" for task, there in able.items() if there]
    remedy = " or ".join([*commands, "objectives.names=NAMES of what it was trained on"])
    raise ValueError(f"{path} was not trained on {', '.join(lacking)} (no {OBJECTIVES[lacking[0]].HEAD}): {remedy}")


def held_out_names(data: DataConfig, split: str) -> tuple[tuple[str, ...], str]:
    """The sources to score on, and how to call them: data.val_sources; without them those of data.sources that have a
    `split` besides training ("coco", "f30k"). Raises ValueError where nothing is left: tables and shards are training
    data."""
    names = data.val_sources or parted(data, split)
    if not names or (not data.val_sources and split == "train"):
        raise ValueError(
            f"data.sources={','.join(data.sources)} has no {split} split that was kept from training: name held-out "
            "data, for example data.val_sources=arrow:TABLE"
        )
    return names, split if all(name in PUBLISHED for name in names) else ", ".join(names)


def parted(data: DataConfig, split: str) -> tuple[str, ...]:
    """Those of data.sources that are data sets with a `split`."""
    return tuple(name for name in data.sources if split in PUBLISHED.get(name, {}))


def settings_of(path: Path, task: str) -> RunConfig:
    """The resolved recipe of a run directory; for anything else the task's recipe."""
    if (path / "run.json").is_file():
        config = from_dict(RunConfig, read_json(path / "config.json"))
        own = [name for name in config.objectives.names if name in FINE_TUNING]
        if own and task != own[0]:
            hint = f": meter-fast evaluate {path} {own[0]}" if own[0] != "reconstruction" else ""
            raise ValueError(f"{path} is a run of {own[0]}, not of {task}{hint}")
        return config
    return resolve([task])


def tokenizer_of(path: Path, name: str) -> str:
    """The tokenizer folder that lies with a model, else `name`."""
    for folder in (path / "tokenizer", path / "export" / "tokenizer"):
        if folder.is_dir():
            return str(folder)
    return name


def check_vocabulary(model: Meter, tokenizer) -> None:
    """Raise ValueError when the tokenizer has more tokens than the model: its ids would not be the model's."""
    if len(tokenizer) > model.config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.text.vocab_size}: "
            "name the tokenizer that the model was trained with (data.tokenizer=FOLDER)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`meter-fast evaluate` as one of several processes. Returns the exit code: 0, 2 wrong input, 1 anything else."""
    from meter_fast import cli  # which reads this module

    given = sys.argv[1:] if argv is None else argv
    command = ["evaluate", *(word for word in given if not word.startswith("--local_rank"))]
    main_process = slurm.rank(os.environ) == 0
    with contextlib.nullcontext() if main_process else contextlib.redirect_stderr(io.StringIO()):
        cli.parse(command)
    try:
        return cli.main(command, start(PATIENCE))
    except StoppedTogether:
        return cli.EXIT_WRONG_INPUT
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    from meter_fast.train import leave

    leave(main())
