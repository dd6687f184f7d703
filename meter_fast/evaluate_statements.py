"""NLVR2 and SNLI-VE on a split, by any number of processes.

Knows statements and where they lie; how a model judges them is in `score_statements`.
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
from meter_fast.training.world import World


def evaluate_statements(path: Path, task: str, settings: Sequence[str], limit: int | None, world: World) -> dict:
    """`evaluate_split` for "nlvr2" or "snli_ve": {task: the scores of `score_statements.summary`, "split", ...}."""
    judged, told = world.each(lambda: _judge(path, task, settings, limit, world))
    judged = sorted(Judged(*row) for rows in world.share(judged) for row in rows)
    return {task: summary(judged, task), **told, "skipped": skipped_by_all(world, told["skipped"])}


def _judge(
    path: Path, task: str, settings: Sequence[str], limit: int | None, world: World
) -> tuple[list[Judged], dict]:
    """The statements of this process, and what is said of the split."""
    config = override(settings_of(path, task), settings)
    model, data = tuned(path, task), config.data
    if not data.val_sources:
        raise ValueError(f"name held-out {TASKS[task].texts}, for example data.val_sources=arrow:"
                         f"{TASKS[task].splits['val'][0]}")  # fmt: skip
    sources = open_statements(task, data.val_sources, data.root, data.val_split)

    def assemble(text: TextPipeline, images: ImageBackend) -> StatementAssembler:
        return StatementAssembler(sources, text, images, config.run.seed, data.max_image_pixels, replace=False)

    return over_texts(path, model, config, limit, world, assemble, partial(judge, task=task))
