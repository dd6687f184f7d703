"""The training objectives on held-out pairs: loss and accuracy of a model over a split, on any number of ranks.

Knows objectives, loaders and where a model's settings lie. What single words and captions tell is in `score`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meter_fast
from meter_fast.config import NO_PRETRAINING, DataConfig, RunConfig, from_dict, override
from meter_fast.data.answers import Answers, names_in_tables, read_answers
from meter_fast.data.batch import Batch
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.loader import EvaluationLoader
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler, question_split_loader
from meter_fast.data.sources import PUBLISHED, Sources, open_sources
from meter_fast.data.spans import open_denoiser
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.models.export import ANSWERS
from meter_fast.models.files import read_json
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.recipes import resolve
from meter_fast.score_vqa import score_questions
from meter_fast.training.masked_images import open_cells


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
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    try:
        for batch in batches:
            losses = model(batch.to(device, dtype))
            for name, (correct, count) in losses.metrics.items():
                row = torch.stack([losses.parts[name].double() * count, correct.double(), count.double()])
                sums[name] = sums.get(name, 0) + row
    finally:
        model.train(was_training)
    if not sums:
        raise ValueError("evaluation: the held-out split gave no batch")
    return {name: _means(_over_ranks(row)) for name, row in sums.items()}


def _over_ranks(row: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(row)
    return row


def _means(row: Tensor) -> dict[str, float]:
    loss, correct, count = row.tolist()
    return {"loss": loss / max(count, 1.0), "accuracy": correct / max(count, 1.0), "count": int(count)}


def evaluate_split(
    model_path: str | Path, task: str, settings: Sequence[str] = (), pairs: int | None = None, device: str | None = None
) -> dict:
    """Score the model at `model_path` (run directory, export folder or METER .ckpt) on held-out pairs, on one process.

    task: "pretrain", or "vqa" (see `evaluate_questions`). settings: "data.root=FOLDER" and the like, over the run's own
    or, for a model without a run, over the recipe's; `held_out_names` says what is scored, of data.val_split. pairs: at
    most so many. Returns `evaluate_pretraining`'s scores and {"split", "pairs", "skipped"}. Raises ValueError where
    something is missing or does not fit.
    """
    path = Path(model_path)
    if task == "vqa":
        return evaluate_questions(path, settings, pairs, device)
    model = meter_fast.load(path)
    config = override(_settings_of(path, task), settings)
    data, objectives = config.data, config.objectives
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    transform = image_transform(data.transform, model.config.vision.image_size)
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    length = min(data.max_text_length, model.config.text.max_length)
    denoiser = open_denoiser(tokenizer, objectives.names, objectives.span_probability, objectives.span_length)
    text = TextPipeline(tokenizer, length, objectives.masking, objectives.mlm_probability, denoiser)
    names, said = held_out_names(data, data.val_split)
    sources = open_sources(names, data.root, data.val_split)
    backend = open_backend(data.backend, transform, device, torch.float32, max_batch=config.engine.micro_batch)
    try:
        loader = EvaluationLoader(
            sources,
            text,
            backend,
            batch_size=config.engine.micro_batch,
            limit=pairs,
            seed=config.run.seed,
            workers=data.workers,
            max_bad_share=data.max_bad_share,
            max_image_pixels=data.max_image_pixels,
            cells=open_cells(objectives, model.config.vision, transform, device),
        )
        scores = evaluate_pretraining(JointLoss(model.to(device), objectives.names), loader, device)
    finally:
        backend.close()
    count = len(sources) if pairs is None else min(pairs, len(sources))
    return {**scores, "split": said, "pairs": count, "skipped": dict(loader.skipped)}


def evaluate_questions(path: Path, settings: Sequence[str], limit: int | None, device: str | None) -> dict:
    """`evaluate_split` for visual question answering: {"vqa": `score_questions`'s scores, "split", "pairs", "skipped"}.

    The label space is the model's own (answers.json), or data.answers; the tables' must agree with it.
    """
    model = meter_fast.load(path)
    if model.vqa_head is None:
        raise ValueError(f"{path} answers no questions (it has no vqa_head): fine-tune it first, "
                         f"meter-fast train vqa run.init={path}")  # fmt: skip
    config = override(_settings_of(path, "vqa"), settings)
    data = config.data
    if not data.val_sources:
        raise ValueError("name held-out questions, for example data.val_sources=arrow:vqav2_val")
    sources = open_questions(data.val_sources, data.root, data.val_split)
    answers = _answers_of(path, model, data, sources)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    text = TextPipeline(tokenizer, min(data.max_text_length, model.config.text.max_length))
    transform, batch = image_transform(data.transform, model.config.vision.image_size), config.engine.micro_batch
    backend = open_backend(data.backend, transform, device, torch.float32, max_batch=batch)
    try:
        assembler = QuestionAssembler(
            sources, text, backend, config.run.seed, len(answers), data.max_image_pixels, replace=False
        )
        loader = question_split_loader(
            assembler, batch_size=batch, limit=limit, seed=config.run.seed, workers=data.workers,
            max_bad_share=data.max_bad_share,
        )  # fmt: skip
        scores = score_questions(model.to(device), loader, answers, device)
    finally:
        backend.close()
    count = len(sources) if limit is None else min(limit, len(sources))
    return {"vqa": scores, "split": ", ".join(data.val_sources), "pairs": count, "skipped": dict(loader.skipped)}


def _answers_of(path: Path, model: Meter, data: DataConfig, sources: Sources) -> Answers:
    """The model's label space, checked against the tables. Raises ValueError where there is none or it is another."""
    beside = next((folder / ANSWERS for folder in (path, path / "export") if (folder / ANSWERS).is_file()), None)
    if data.answers or beside is not None:
        answers = read_answers(data.answers or beside)
    else:  # a published checkpoint knows numbers only; its label space is that of the published tables
        answers = Answers((None,) * model.config.vqa_answers)
    if len(answers) != model.config.vqa_answers:
        raise ValueError(f"data.answers={data.answers}: {len(answers)} answers, the model has "
                         f"{model.config.vqa_answers}: give the file that it was trained with")  # fmt: skip
    found = names_in_tables(sources.tables)
    answers.check(found, f"a table of {', '.join(data.val_sources)}")
    return Answers(tuple(found.get(label, name) for label, name in enumerate(answers.names)))


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


def _settings_of(path: Path, task: str) -> RunConfig:
    """The resolved recipe of a run directory; for anything else the task's recipe."""
    if (path / "run.json").is_file():
        config = from_dict(RunConfig, read_json(path / "config.json"))
        own = [name for name in config.objectives.names if name in NO_PRETRAINING]
        if own and task != own[0]:
            hint = f": meter-fast evaluate {path} {own[0]}" if own[0] in ("vqa", "retrieval") else ""
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


if __name__ == "__main__":  # what a launcher starts on each process: `meter-fast evaluate`
    import sys

    from meter_fast.cli import EXIT_WRONG_INPUT, main
    from meter_fast.training.world import StoppedTogether

    try:
        code = main(["evaluate", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])
    except StoppedTogether:  # the main process has said why
        code = EXIT_WRONG_INPUT
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
