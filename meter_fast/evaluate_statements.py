"""NLVR2 and SNLI-VE on a split, by any number of processes: scores, and a file of the judgements.

Knows statements and where they lie; how a model judges them is in `score_statements`, the file in `submission`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from meter_fast.config import override
from meter_fast.data.images import ImageBackend
from meter_fast.data.statement_tables import TASKS, open_statements
from meter_fast.data.statements import StatementAssembler
from meter_fast.data.text import TextPipeline
from meter_fast.evaluate import settings_of, skipped_by_all
from meter_fast.evaluate_texts import over_texts, tuned
from meter_fast.score_statements import Judged, judge, summary
from meter_fast.submission import LIKELY_LABEL, Row, check_place, judgement_file, statement_rows
from meter_fast.training.monitor import replace_text
from meter_fast.training.world import World


def evaluate_statements(
    path: Path,
    task: str,
    settings: Sequence[str],
    limit: int | None,
    world: World,
    submission: str | Path | None = None,
    annotations: str | Path | None = None,
) -> dict:
    """`evaluate_split` for "nlvr2" or "snli_ve": {task: the scores of `score_statements.summary`, "split", ...}.

    submission: a file with every statement of the split once, see `submission.judgement_file`; {"submission": {"file",
    "statements", "filled", "filled_with"}} then counts those that could not be judged. annotations: of NLVR2, what
    names them, see `submission.statement_rows`.
    """
    if submission is not None and limit is not None:
        raise ValueError("a submission has every statement of the split: leave out --pairs")
    if annotations is not None and submission is None:
        raise ValueError("--annotations names the statements of a submission: give --submission FILE, too")
    judged, told, rows = world.each(lambda: _judge(path, task, settings, limit, world, submission, annotations))
    judged = sorted(Judged(*row) for every in world.share(judged) for row in every)
    told["skipped"] = skipped_by_all(world, told["skipped"])
    if submission is not None:
        told["submission"] = world.together(lambda: _submit(submission, rows, judged, task))
    return {task: summary(judged, task), **told}


def _judge(
    path: Path,
    task: str,
    settings: Sequence[str],
    limit: int | None,
    world: World,
    submission: str | Path | None,
    annotations: str | Path | None,
) -> tuple[list[Judged], dict, list[Row]]:
    """The statements of this process, what is said of the split, and the rows of the submission."""
    config = override(settings_of(path, task), settings)
    model, data = tuned(path, task), config.data
    if not data.val_sources:
        raise ValueError(f"name held-out {TASKS[task].texts}, for example data.val_sources=arrow:"
                         f"{TASKS[task].splits['val'][0]}")  # fmt: skip
    sources = open_statements(task, data.val_sources, data.root, data.val_split)
    rows: list[Row] = []
    if submission is not None and check_place(submission):
        rows = statement_rows(sources, task, None if annotations is None else Path(annotations))

    def assemble(text: TextPipeline, images: ImageBackend) -> StatementAssembler:
        return StatementAssembler(sources, text, images, config.run.seed, data.max_image_pixels, replace=False)

    judged, told = over_texts(path, model, config, limit, world, assemble, partial(judge, task=task))
    return judged, told, rows


def _submit(file: str | Path, rows: Sequence[Row], judged: Sequence[Judged], task: str) -> dict[str, object]:
    """Write the file of judgements, and say what is in it."""
    said = {one.sample: TASKS[task].labels[one.said] for one in judged}
    missing = sum(row.sample not in said for row in rows)
    replace_text(Path(file), judgement_file(rows, said, LIKELY_LABEL[task], task))
    likely = LIKELY_LABEL[task] if missing else None
    return {"file": str(file), "statements": len(rows), "filled": missing, "filled_with": likely}
