"""Results in the form that evaluation servers and official scripts read: VQAv2's answers, judgements of NLVR2's and
SNLI-VE's statements, COCO's captions.

Knows samples, identities and files. Knows no models. Every question, statement and picture of a split is in a file, as
servers refuse files in which one is missing: what cannot be read gets the answer, the label or the caption that is
likely for any picture, which is counted. Files are written complete or not at all.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meter_fast.data.prepare.json_stream import lines
from meter_fast.data.prepare.plan import field_of
from meter_fast.data.sources import Sources
from meter_fast.training.monitor import replace_text

NO_PICTURE = "a picture"  # the caption of one that cannot be read
LIKELY_ANSWER = "yes"  # the most frequent one of VQAv2
LIKELY_LABEL = {"nlvr2": "true", "snli_ve": "entailment"}  # classes of both are about equally frequent
_NUMBERED = re.compile(r"(?:COCO_[a-z0-9]+_)?(\d+)")


def check_place(path: str | Path) -> Path:
    """The path, if a file may be written there. Raises ValueError, before anything is computed for it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: the folder {path.parent} does not allow it")
    return path


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Write a JSON file complete or not at all. Raises OSError."""
    replace_text(Path(path), json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------ VQAv2's answers


def check_questions(sources: Sources) -> np.ndarray:
    """question_id of every sample, [n] int64. Raises ValueError for one that is there twice: a server wants it once."""
    ids = np.concatenate([table.question_ids() for table in sources.tables])
    values, counts = np.unique(ids, return_counts=True)
    if counts.max() > 1:
        raise ValueError(
            f"{', '.join(sources.files)}: {int((counts > 1).sum()):,} questions are there more than once, the first "
            f"with question_id {values[counts.argmax()]}: a submission has each once; name each table once"
        )
    return ids


def answer_file(ids: np.ndarray, said: Mapping[int, str], otherwise: str) -> list[dict[str, int | str]]:
    """[{"question_id", "answer"}] for all of ids [n] in their order. said: by number in ids; otherwise: the answer of
    those that are not there."""
    return [{"question_id": int(one), "answer": said.get(n, otherwise)} for n, one in enumerate(ids.tolist())]


# ------------------------------------------------------------------------------------------- statements about pictures


class Row(NamedTuple):
    """One line of a file of judgements. identifier: what names the statement; sample: its number in the split, None for
    one that no table has; text: what is said."""

    identifier: str
    sample: int | None
    text: str


def statement_rows(sources: Sources, task: str, annotations: Path | None = None) -> list[Row]:
    """Every statement of a split of "nlvr2" or "snli_ve", each once.

    NLVR2 calls them SPLIT-SET-PAIR-SENTENCE. Tables have this of the two pictures alone, so the sentence is numbered by
    its place among theirs, unless annotations, the official file of JSON lines, tells the number; then each of its
    lines is in the list. SNLI-VE's are called by table, row and place. Raises ValueError for a statement without name,
    with that of another or of no line of the annotations, and for annotations that cannot be read.
    """
    statements = [sources.read(n) for n in range(len(sources))]
    names = [f"{one.pair}-{one.number}" if task == "nlvr2" else one.name for one in statements]
    bare = next((one.name for one in statements if task == "nlvr2" and one.pair is None), None)
    if bare is not None:
        raise ValueError(f"{bare} has no identifier: a submission names each statement by it; write the table again")
    _once(names, ", ".join(sources.files))
    rows = [Row(name, n, one.text) for n, (name, one) in enumerate(zip(names, statements, strict=True))]
    if annotations is None:
        return rows
    places: dict[tuple[str, str], list[int]] = {}
    for n, one in enumerate(statements):
        places.setdefault((one.pair or "", one.text), []).append(n)
    named = []
    for identifier, text in _annotated(annotations):
        waiting = places.get((identifier.rpartition("-")[0], text), [])
        named.append(Row(identifier, waiting.pop(0) if waiting else None, text))
    _once([row.identifier for row in named], str(annotations))
    left = [n for waiting in places.values() for n in waiting]
    if left:
        raise ValueError(
            f"{annotations} does not have {len(left):,} of the {len(rows):,} statements, the first "
            f"{statements[min(left)].name}: give the annotations of {', '.join(sources.files)}"
        )
    return named


def _once(names: Sequence[str], where: str) -> None:
    """Raise ValueError for a statement that is there twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"{where}: {name} is there more than once, and a submission has each statement once; "
                         "name each table once")  # fmt: skip


def _annotated(path: Path) -> Iterator[tuple[str, str]]:
    """Identifier and sentence of each line of NLVR2's annotations."""
    try:
        for number, entry in lines(path):
            found = [field_of(entry, name, path, f"line {number}") for name in ("identifier", "sentence")]
            yield str(found[0]), str(found[1]).strip()
    except OSError as error:
        raise ValueError(f"--annotations {path}: cannot read it ({error.strerror})") from None


def judgement_file(rows: Sequence[Row], said: Mapping[int, str], otherwise: str, task: str) -> str:
    """NLVR2: lines "IDENTIFIER,True" (as its evaluation script reads); SNLI-VE, which has no form of its own: JSON
    lines {"statement", "hypothesis", "prediction"}. said: by sample; otherwise: the label of those that are not there.
    """
    labels = [said.get(row.sample, otherwise) if row.sample is not None else otherwise for row in rows]
    if task == "nlvr2":
        found = [f"{row.identifier},{label.capitalize()}" for row, label in zip(rows, labels, strict=True)]
    else:
        found = [
            json.dumps({"statement": row.identifier, "hypothesis": row.text, "prediction": label}, ensure_ascii=False)
            for row, label in zip(rows, labels, strict=True)
        ]
    return "\n".join(found) + "\n"


# ------------------------------------------------------------------------------------------------------ COCO's captions


def image_id(name: str | int | None) -> int | None:
    """COCO's number of a picture: "COCO_val2014_000000000004.jpg" -> 4, "000000000004.jpg" -> 4, 4 -> 4; None for
    others."""
    if isinstance(name, int):
        return name
    found = _NUMBERED.fullmatch(Path(name).stem) if name else None
    return int(found[1]) if found else None


def image_ids(names: Sequence[str | int | None]) -> tuple[list[int], bool]:
    """The number of each picture, and whether it is that of its name. Where one has none, or two have the same, all
    are counted from 0."""
    found = [image_id(name) for name in names]
    if None in found or len(set(found)) < len(found):
        return list(range(len(names))), False
    return found, True


def caption_file(ids: Sequence[int], captions: Sequence[str | None]) -> list[dict[str, int | str]]:
    """[{"image_id", "caption"}] in the order given; None: a picture that could not be read."""
    return [
        {"image_id": one, "caption": NO_PICTURE if text is None else text}
        for one, text in zip(ids, captions, strict=True)
    ]
