"""Visual question answering on a split, by any number of processes: scores, and the file of the evaluation server.

Knows questions, label spaces and where they lie. How a model is asked is in `score_vqa`, the file in `submission`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from meter_fast.config import DataConfig, override
from meter_fast.data.answers import Answers, most_frequent, names_in_tables, read_answers
from meter_fast.data.images import ImageBackend
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler
from meter_fast.data.sources import SourceError, Sources
from meter_fast.data.tables import TableError
from meter_fast.data.text import TextPipeline
from meter_fast.evaluate import settings_of, skipped_by_all
from meter_fast.evaluate_texts import over_texts, tuned
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
    config = override(settings_of(path, "vqa"), settings)
    model, data = tuned(path, "vqa"), config.data
    if not data.val_sources:
        raise ValueError("name held-out questions, for example data.val_sources=arrow:vqav2_val")
    sources = open_questions(data.val_sources, data.root, data.val_split)
    answers = answers_of(path, model, data, sources, named=submission is not None)
    ids = check_questions(sources) if submission is not None and check_place(submission) else None

    def assemble(text: TextPipeline, images: ImageBackend) -> QuestionAssembler:
        seed, pixels = config.run.seed, data.max_image_pixels
        return QuestionAssembler(sources, text, images, seed, len(answers), pixels, replace=False)

    asked, told = over_texts(path, model, config, limit, world, assemble, partial(ask, answers=answers))
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
