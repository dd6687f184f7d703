"""Results in the form that evaluation servers and official scripts read: VQAv2's answers, COCO's captions.

Knows samples, identities and files. Knows no models. Every question and every picture of a split is in a file, as
servers refuse files in which one is missing: what cannot be read gets the answer or the caption that is likely for any
picture, which is counted. Files are written complete or not at all.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from meter_fast.data.sources import Sources

NO_PICTURE = "a picture"  # the caption of one that cannot be read
LIKELY_ANSWER = "yes"  # the most frequent one of VQAv2
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
    """Write a JSON file beside its place, then rename it. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
