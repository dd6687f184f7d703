"""Raw data to the Arrow tables that training reads: published data sets, and a user's own pictures.

`caption_sets` and `question_sets` know the downloads, `own` a user's CSV and JSONL files; each makes a plan (`plan`)
that `run` carries out with `reading` and `writing`. `checking` reads finished tables. Nothing here knows models or
tokenizers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meter_fast.data.prepare import caption_sets, question_sets
from meter_fast.data.prepare.plan import Plan, PrepareError
from meter_fast.data.prepare.run import carry_out, left_out_lines

__all__ = ["SETS", "PrepareError", "carry_out", "left_out_lines", "plan_set"]


@dataclass(frozen=True)
class RawSet:
    """make: the raw folder and splits -> a plan. max_missing: the share of pictures that usually may be missing: of the
    sets from the web many links are dead, and their lists name them all the same."""

    make: Callable[[Path, Sequence[str]], Plan]
    splits: tuple[str, ...]
    max_missing: float = 0.01


SETS = {
    "coco": RawSet(caption_sets.coco, ("train", "val", "restval", "test")),
    "vg": RawSet(caption_sets.visual_genome, ("train",)),
    "gcc": RawSet(caption_sets.conceptual_captions, ("train", "val"), 0.5),
    "sbu": RawSet(caption_sets.sbu, ("train",), 0.5),
    "f30k": RawSet(caption_sets.f30k, ("train", "val", "test")),
    "vqav2": RawSet(question_sets.vqav2, ("train", "val", "test", "test-dev")),
    "nlvr2": RawSet(question_sets.nlvr2, question_sets.NLVR2_SPLITS),
    "snli_ve": RawSet(question_sets.snli_ve, ("train", "dev", "test")),
}


def plan_set(name: str, raw: Path, splits: Sequence[str] = ()) -> Plan:
    """What is to be written of a published set. splits: none for all. Raises PrepareError."""
    known = SETS[name].splits
    wrong = [split for split in splits if split not in known]
    if wrong:
        raise PrepareError(f"{name} has no split {wrong[0]!r}: choose {', '.join(known)}")
    try:
        return SETS[name].make(raw, tuple(splits) or known)
    except (TypeError, AttributeError, KeyError) as error:
        raise PrepareError(f"{raw}: annotations of {name} have not the expected form ({error!r})") from error
