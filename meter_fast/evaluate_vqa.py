"""Visual question answering on a split, by any number of processes: scores, and the file of the evaluation server.

Knows questions, label spaces and where they lie. How a model is asked is in `score_vqa`, the file in `submission`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import meter_fast
from meter_fast.config import DataConfig, override
from meter_fast.data.answers import Answers, most_frequent, names_in_tables, read_answers
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler, question_split_loader
from meter_fast.data.sources import SourceError, Sources
from meter_fast.data.tables import TableError
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import check_vocabulary, settings_of, skipped_by_all, tokenizer_of
from meter_fast.models.export import ANSWERS
from meter_fast.models.meter import Meter
from meter_fast.score_vqa import Asked, answered, ask, summary
from meter_fast.submission import LIKELY_ANSWER, answer_file, check_place, check_questions, write_json
from meter_fast.training.world import World


def evaluate_questions(
    path: Path, settings: Sequence[str], limit: int | None, world: World, submission: str | Path | None = None
) -> dict:
    """`evaluate_split` for visual question answering: {"vqa": the scores of `score_vqa.summary`, "split", ...}.

    The label space is the model's own (answers.json), or data.answers; the tables' must agree with it. submission: the
    evaluation server's file, with every question of the split; {"submission": {"file", "questions", "filled",
    "filled_with"}} then counts those that could not be asked. A split without answers gives that file and no score.
    """
    if submission is not None and limit is not None:
        raise ValueError("a submission has every question of the split: leave out --pairs")
    # Nothing in here waits for other processes: one that fails takes all along.
    asked, told, finish = world.each(lambda: _ask_questions(path, settings, limit, world, submission))
    asked = sorted(Asked(*row) for rows in world.share(asked) for row in rows)
    unknown = submission is not None and bool(asked) and not answered(asked)
    scores = {} if unknown else {"vqa": summary(asked)}
    told["skipped"] = skipped_by_all(world, told["skipped"])
    if submission is not None:
        told["submission"] = world.together(lambda: finish(asked))
    return {**scores, **told}


def _ask_questions(
    path: Path, settings: Sequence[str], limit: int | None, world: World, submission: str | Path | None
) -> tuple[list[Asked], dict, Callable[[Sequence[Asked]], dict]]:
    """The questions of this process, what is said of the split, and what writes the submission."""
    model = meter_fast.load(path)
    if model.vqa_head is None:
        raise ValueError(f"{path} answers no questions (it has no vqa_head): fine-tune it first, "
                         f"meter-fast train vqa run.init={path}")  # fmt: skip
    config = override(settings_of(path, "vqa"), settings)
    data = config.data
    if not data.val_sources:
        raise ValueError("name held-out questions, for example data.val_sources=arrow:vqav2_val")
    sources = open_questions(data.val_sources, data.root, data.val_split)
    answers = answers_of(path, model, data, sources, named=submission is not None)
    ids = check_questions(sources) if submission is not None and check_place(submission) else None
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    text = TextPipeline(tokenizer, min(data.max_text_length, model.config.text.max_length))
    transform, batch = image_transform(data.transform, model.config.vision.image_size), config.engine.micro_batch
    backend = open_backend(data.backend, transform, world.device, torch.float32, max_batch=batch)
    try:
        assembler = QuestionAssembler(
            sources, text, backend, config.run.seed, len(answers), data.max_image_pixels, replace=False
        )
        loader = question_split_loader(
            assembler, batch_size=batch, limit=limit, seed=config.run.seed, workers=data.workers,
            max_bad_share=data.max_bad_share,
        ).dealt(world.rank, world.size)  # fmt: skip
        asked = ask(model.to(world.device), loader, answers, world.device)
    finally:
        backend.close()
    count = len(sources) if limit is None else min(limit, len(sources))
    told = {"split": ", ".join(data.val_sources), "tables": sources.files, "pairs": count,
            "skipped": dict(loader.skipped)}  # fmt: skip
    return asked, told, lambda everything: _submit(submission, ids, everything, answers, data)


def _submit(
    file: str | Path, ids: np.ndarray, asked: Sequence[Asked], answers: Answers, data: DataConfig
) -> dict[str, object]:
    """Write the evaluation server's file, and say what is in it."""
    said = {one.sample: answers.names[one.label] for one in asked}
    missing = len(ids) - len(said)
    likely = likely_answer(data) if missing else None
    write_json(file, answer_file(ids, said, likely))
    return {"file": str(file), "questions": len(ids), "filled": missing, "filled_with": likely}


def likely_answer(data: DataConfig) -> str:
    """The answer that most questions of training have; where the training tables are not there, "yes"."""
    try:
        tables = open_questions(data.sources, data.root, "train").tables
    except (SourceError, TableError):  # whoever evaluates need not have them
        return LIKELY_ANSWER
    return most_frequent(tables) or LIKELY_ANSWER


def answers_of(path: Path, model: Meter, data: DataConfig, sources: Sources, named: bool = False) -> Answers:
    """The model's label space, checked against the tables. named: also with the names of the published training and
    validation tables, where the model has none. Raises ValueError where there is none or it is another."""
    beside = next((folder / ANSWERS for folder in (path, path / "export") if (folder / ANSWERS).is_file()), None)
    if data.answers or beside is not None:
        answers = read_answers(data.answers or beside)
    else:  # a published checkpoint knows numbers only; its label space is that of the published tables
        answers = Answers((None,) * model.config.vqa_answers)
    if len(answers) != model.config.vqa_answers:
        raise ValueError(f"data.answers={data.answers}: {len(answers)} answers, the model has "
                         f"{model.config.vqa_answers}: give the file that it was trained with")  # fmt: skip
    answers = _with_names(answers, sources, data.val_sources)
    if named and answers.unnamed == len(answers):
        try:
            answers = _with_names(answers, open_questions(("vqa",), data.root, "train"), ("vqa",))
        except SourceError as error:
            raise ValueError(
                f"{path} knows its {len(answers)} answers by number only, and their names are not to be found: give "
                f"data.answers=FILE, or put the tables that hold them into data.root ({error})"
            ) from None
    return answers


def _with_names(answers: Answers, sources: Sources, names: Sequence[str]) -> Answers:
    found = names_in_tables(sources.tables)
    answers.check(found, f"a table of {', '.join(names)}")
    return Answers(tuple(found.get(label, name) for label, name in enumerate(answers.names)))
