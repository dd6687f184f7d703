"""A user's own pictures with captions or questions, named by a CSV or JSONL file.

Knows these files' columns and what can be wrong in their rows: every row that cannot be used is named by its line.
Gives a plan; knows nothing of how pictures are read.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meter_fast.data.answers import Answers, read_answers
from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.prepare.json_stream import lines
from meter_fast.data.prepare.plan import CAPTION_COLUMNS, Folders, LeftOut, Plan, PrepareError, Row
from meter_fast.data.prepare.question_sets import Asked, question_columns, question_values
from meter_fast.data.prepare.vqa_words import score

COLUMNS = {  # of each kind: those that must be there, and those that may
    "captions": (("image", "caption"), ("split",)),
    "retrieval": (("image", "caption", "split"), ()),
    "vqa": (("image", "question"), ("answer", "answers", "question_id", "split")),
}
BETWEEN = "|"  # answers in one field of a CSV file
PEOPLE = 10  # who answer a question of VQAv2; scores are by counts among so many


class _BadRow(ValueError):
    """A row that cannot be used. `cause` is counted, `detail` listed."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


@dataclass(frozen=True, slots=True)
class _Record:
    """A row that can be used. texts: its captions, or its question."""

    line: int
    image: str
    split: str
    texts: tuple[str, ...]
    answers: tuple[str, ...] = ()
    question_id: int | None = None


def own_captions(
    kind: str, source: Path, name: str = "", images: Path | None = None, max_bad_share: float = 0.01
) -> Plan:
    """Captions: one row for each picture, with all its captions, in the order of the file.

    kind: "captions", or "retrieval", where there must be a split column. source: the .csv or .jsonl file, or a folder
    that holds one. name: of the tables, NAME or NAME_{split}; else the file's. images: folder of the pictures; else the
    file's. Raises PrepareError: wrong columns, or more rows than `max_bad_share` that cannot be used.
    """
    records, lost, plan, file = _read(kind, source, name, images)
    _refuse(file, lost, len(records), max_bad_share)
    by_split: dict[str, dict[str, list[str]]] = {}
    for one in records:
        by_split.setdefault(one.split, {}).setdefault(one.image, []).extend(one.texts)
    for split, pictures in by_split.items():
        rows = [
            Row((image,), {"caption": captions, "image_id": Path(image).name, "split": split or "train"})
            for image, captions in pictures.items()
        ]
        plan.add_rows(_table(plan.name, split), split, CAPTION_COLUMNS, rows, lost.pop(split, []))
    return _whole(plan, lost, by_split)


def own_questions(
    source: Path,
    name: str = "",
    images: Path | None = None,
    max_bad_share: float = 0.01,
    answers: Path | None = None,
    min_count: int = 1,
) -> Plan:
    """Questions: one row for each picture, and the answers list, `answers.json`.

    answers: a JSON list to take as label space; else it is what is answered `min_count` times or more, in order of
    first appearance. A split without any answer is a test split; elsewhere questions none of whose answers has a label
    are left out. A question's answers score by their share of all it was given, as VQAv2's by counts of ten. Else as
    own_captions.
    """
    records, lost, plan, file = _read("vqa", source, name, images)
    answered = {one.split for one in records if one.answers}
    for one in records:
        if one.split in answered and not one.answers:
            where = f"of split {one.split!r} " if one.split else ""
            lost.setdefault(one.split, []).append(_bad(file, one.line, "no answer", f"others {where}have one"))
    records = [one for one in records if one.answers or one.split not in answered]
    _refuse(file, lost, len(records), max_bad_share)
    names: list[str | None]
    if answers is not None:
        names = list(read_answers(answers).names)
        plan.annotations.append(answers)
    else:
        counts = Counter(answer for one in records for answer in one.answers)
        names = [answer for answer, count in counts.items() if count >= min_count]
    if answered and not names:
        raise PrepareError(f"{file}: no answer is given {min_count} times or more; give a smaller --min-count")
    labels = {text: label for label, text in enumerate(names) if text is not None}
    by_split: dict[str, dict[str, list[Asked]]] = {}
    unlabelled: Counter[str] = Counter()
    for number, one in enumerate(records):
        pictures = by_split.setdefault(one.split, {})
        given = Counter(one.answers)
        known = [(labels[text], _soft(count, len(one.answers))) for text, count in given.items() if text in labels]
        if one.answers and not known:
            unlabelled[one.split] += 1
            continue
        identity = number if one.question_id is None else one.question_id
        labelled = tuple(label for label, _ in known), tuple(soft for _, soft in known)
        pictures.setdefault(one.image, []).append((identity, one.texts[0], *labelled))
    for split, pictures in by_split.items():
        has = split in answered
        rows = [
            Row((image,), question_values(asked, names, place, split or "train", has))
            for place, (image, asked) in enumerate(pictures.items())
        ]
        plan.add_rows(_table(plan.name, split), split, question_columns(has), rows, lost.pop(split, []))
    plan.notes.update(
        {f"questions{f' of {split}' if split else ''} without a label, left out": n for split, n in unlabelled.items()}
    )
    if names:
        plan.notes["answers"] = len(names)
        plan.files["answers.json"] = Answers(tuple(names)).text()
    return _whole(plan, lost, by_split)


def _soft(count: int, of: int) -> float:
    return score(round(PEOPLE * count / of))


def _table(name: str, split: str) -> str:
    return f"{name}_{split}" if split else name


def _whole(plan: Plan, lost: dict[str, list[LeftOut]], by_split: dict[str, dict[str, list]]) -> Plan:
    """The plan, with the unusable rows of splits in which none can be used, and pictures counted that leak."""
    for split, bad in lost.items():
        plan.left_out[split] = bad
    splits = Counter(image for pictures in by_split.values() for image in pictures)
    leaking = sum(count > 1 for count in splits.values())
    if leaking:
        plan.notes["pictures that are in more than one split"] = leaking
    return plan


def _bad(file: Path, line: int, cause: str, detail: str) -> LeftOut:
    return LeftOut(f"{file.name} line {line}", cause, detail)


def _refuse(file: Path, lost: dict[str, list[LeftOut]], good: int, max_bad_share: float) -> None:
    """Raises PrepareError, naming the first rows, where too many cannot be used."""
    bad = [one for several in lost.values() for one in several]
    if good and len(bad) <= max_bad_share * (good + len(bad)):
        return
    if not bad:
        raise PrepareError(f"{file} has no rows")
    first = "; ".join(f"{one.name}: {one.cause}, {one.detail}" for one in bad[:10])
    raise PrepareError(
        f"{len(bad):,} of {good + len(bad):,} rows cannot be used, more than --max-bad-share {max_bad_share:g}. {first}"
        f"{'; ...' if len(bad) > 10 else ''}"
    )


def _read(
    kind: str, source: Path, name: str, images: Path | None
) -> tuple[list[_Record], dict[str, list[LeftOut]], Plan, Path]:
    """The rows that can be used, why others cannot, by split, an empty plan, and the file."""
    file = _file(source)
    folder = images or file.parent
    if not folder.is_dir():
        raise PrepareError(f"--images {folder} is not a folder")
    if not _is_name(name):
        raise PrepareError(f"--name {name!r}: it becomes the name of a file")
    records: list[_Record] = []
    lost: dict[str, list[LeftOut]] = {}
    where, numbers = Folders(), set()
    for line, row in _rows(kind, file):
        split = ""
        try:
            split = _text(row.get("split"))
            record = _record(kind, line, row, folder, split, where)
            if record.question_id in numbers:
                raise _BadRow("wrong field", f"question_id {record.question_id} is there twice")
            if record.question_id is not None:
                numbers.add(record.question_id)
            records.append(record)
        except (_BadRow, BadCaption) as error:
            of = split if _is_name(split) else ""
            lost.setdefault(of, []).append(_bad(file, line, error.cause, error.detail))
    if numbers and len(numbers) < len(records):
        line = next(one.line for one in records if one.question_id is None)
        raise PrepareError(f"{file} line {line}: no question_id, but other rows have one; give all or none")
    return records, lost, Plan(name or file.stem, annotations=[file]), file


def _file(source: Path) -> Path:
    """The one CSV or JSONL file that `source` is or holds."""
    if source.is_file() and source.suffix.lower() in (".csv", ".jsonl"):
        return source
    if not source.is_dir():
        what = "is no .csv or .jsonl file" if source.exists() else "does not exist"
        raise PrepareError(f"{source} {what}: give the file that names pictures and texts, or its folder")
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in (".csv", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise PrepareError(f"{source} must hold one .csv or .jsonl file, or give the file itself; it holds {names}")
    return found[0]


def _rows(kind: str, file: Path) -> Iterator[tuple[int, dict]]:
    """Line number and fields of each row. Raises PrepareError for wrong columns."""
    if file.suffix.lower() == ".jsonl":
        for line, row in lines(file):
            if not isinstance(row, dict):
                raise PrepareError(f"{file} line {line}: {str(row)[:60]} is no object")
            _check_columns(kind, f"{file} line {line}", row)
            yield line, row
        return
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True)
            _check_columns(kind, str(file), reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    raise PrepareError(f"{file} line {reader.line_num}: not as many fields as columns "
                                       f"({', '.join(reader.fieldnames or ())}); quote texts with commas")  # fmt: skip
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise PrepareError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None
    except csv.Error as error:
        raise PrepareError(f"{file} line {reader.line_num}: no CSV ({error})") from None


def _check_columns(kind: str, where: str, names: object) -> None:
    must, may = COLUMNS[kind]
    found = [str(name) for name in names]
    lacking = [name for name in must if name not in found]
    wanted = f"{kind} has the columns {', '.join(must)}" + (f" and perhaps {', '.join(may)}" if may else "")
    if lacking:
        raise PrepareError(f"{where}: no column {lacking[0]!r}; {wanted}; here are {', '.join(found) or 'none'}")
    if kind == "vqa" and "answer" in found and "answers" in found:
        raise PrepareError(f"{where}: give answer or answers, not both")


def _record(kind: str, line: int, row: dict, folder: Path, split: str, where: Folders) -> _Record:
    """A row, checked. Raises _BadRow or BadCaption."""
    image = _text(row["image"])
    path = folder / image
    if not image or path.name not in where.names(path.parent):
        raise _BadRow("no such picture", f"{image!r} in {folder}")
    if not _is_name(split):
        raise _BadRow("wrong field", f"split {split!r} becomes part of a file's name")
    if kind == "retrieval" and not split:
        raise _BadRow("wrong field", "no split")
    given = row["question" if kind == "vqa" else "caption"]
    texts = tuple(check_caption(_text(one)) for one in (given if isinstance(given, list) and given else [given]))
    if kind != "vqa":
        return _Record(line, str(path), split, texts)
    if len(texts) != 1:
        raise _BadRow("wrong field", f"{len(texts)} questions in one row")
    identity = _text(row.get("question_id"))
    if identity and not identity.isdecimal():
        raise _BadRow("wrong field", f"question_id {identity!r} is no whole number")
    return _Record(line, str(path), split, texts, _answers(row), int(identity) if identity else None)


def _is_name(split: str) -> bool:
    """Whether it can be part of a file's name."""
    return "/" not in split and "\0" not in split and not split.startswith(".")


def _answers(row: dict) -> tuple[str, ...]:
    """`answer`, or `answers`: a list in JSON, or text with | between."""
    given = row.get("answers", row.get("answer"))
    if isinstance(given, str) and "answers" in row:
        given = given.split(BETWEEN)
    texts = [_text(one) for one in (given if isinstance(given, list) else [given])]
    return tuple(check_caption(text) for text in texts if text)


def _text(value: object) -> str:
    """A field as text, without spaces around it. Raises _BadRow for what is neither text nor number."""
    if value is None:
        return ""
    if isinstance(value, bool | dict | list):
        raise _BadRow("wrong field", f"{json.dumps(value)[:60]} where a text should be")
    return str(value).strip()
