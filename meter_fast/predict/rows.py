"""What the shell is given -> rows: pictures, folders of them, and tables. Knows files and columns; reads no picture.

A row that cannot be used keeps its place and says why; input that cannot be used at all is a ValueError.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TABLES = (".csv", ".jsonl")
NO_TABLES = (".tsv", ".json", ".txt", ".parquet", ".arrow", ".xlsx")
PICTURES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
PAIR = ("image_a", "image_b")


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. cause: for counting."""

    cause: str
    message: str


@dataclass(frozen=True)
class Row:
    """columns: as they were given; images: where the pictures are, one or two; text: None for captions."""

    columns: dict[str, object]
    images: tuple[Path, ...]
    text: object
    problem: Problem | None = None


def read_rows(inputs: Sequence[Path], task: str, texts: Sequence[str]) -> tuple[list[Row], int]:
    """The rows of a call, and how many other files a folder holds. Raises ValueError: what is missing, and the
    remedy."""
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path} does not exist: give pictures, a folder of them, or a .csv or .jsonl")
        if path.suffix.lower() in NO_TABLES:
            raise ValueError(f"{path} is neither a picture nor a table that is read here: give a .csv or .jsonl")
    if task == "caption" and texts:
        raise ValueError("caption reads no text: leave --text out")
    if any(path.suffix.lower() in TABLES for path in inputs):
        if len(inputs) > 1:
            raise ValueError(f"{len(inputs)} inputs, with a table among them: give one table, or pictures alone")
        rows = _with_texts(read_table(inputs[0], columns_of(task, not texts)), texts, inputs[0])
        return _each_with_each(rows) if task == "rank" else rows, 0
    if task != "caption" and not texts:
        raise ValueError(f'{task} needs a text: --text "...", or a table with the columns image and text')
    if task == "compare":
        if len(inputs) != 2 or any(path.is_dir() for path in inputs):
            raise ValueError("compare takes two pictures, or a table with the columns image_a, image_b and text")
        given = dict(zip(PAIR, map(str, inputs)))
        return [Row({**given, "text": text}, tuple(inputs), text) for text in texts], 0
    pictures, others = _pictures(inputs)
    if task == "caption":
        return [Row({"image": str(path)}, (path,), None) for path in pictures], others
    return [Row({"image": str(path), "text": text}, (path,), text) for path in pictures for text in texts], others


def columns_of(task: str, with_text: bool) -> tuple[str, ...]:
    """Columns that a table must have."""
    images = PAIR if task == "compare" else ("image",)
    return (*images, "text") if with_text and task != "caption" else images


def _pictures(inputs: Sequence[Path]) -> tuple[list[Path], int]:
    """The pictures given and those of the folders given, by their names; how many other files are in there."""
    found, others = [], 0
    for path in inputs:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(file for file in path.iterdir() if file.is_file())
        own = [file for file in files if file.suffix.lower() in PICTURES]
        if not own:
            raise ValueError(f"{path} holds no pictures ({len(files)} other files): give a folder with {PICTURES[0]}, "
                             f"{PICTURES[3]}, {PICTURES[4]} ... files")  # fmt: skip
        found += own
        others += len(files) - len(own)
    return found, others


def _with_texts(rows: list[Row], texts: Sequence[str], path: Path) -> list[Row]:
    """--text for every row of a table that has no texts of its own."""
    if texts and any("text" in row.columns for row in rows):
        raise ValueError(f"{path} has a column text, and --text was given: use one of them")
    if not texts:
        return rows
    return [Row({**row.columns, "text": text}, row.images, text, row.problem) for row in rows for text in texts]


def _each_with_each(rows: Sequence[Row]) -> list[Row]:
    """Every picture of the rows with every text of the rows; those that have no picture stay as they are."""
    usable = [row.problem is None and isinstance(row.text, str) for row in rows]
    good = [row for row, fits in zip(rows, usable) if fits]
    images = {row.images: row.columns["image"] for row in good}
    texts = list(dict.fromkeys(row.text for row in good))
    pairs = [Row({"image": name, "text": text}, image, text) for image, name in images.items() for text in texts]
    return pairs + [row for row, fits in zip(rows, usable) if not fits]


def read_table(path: Path, needed: Sequence[str]) -> list[Row]:
    """A row for each line of a CSV file with a header, or a JSON object a line; both UTF-8.

    Raises ValueError: a column that is missing, no rows, another encoding.
    """
    lines = _csv_lines(path, needed) if path.suffix.lower() == ".csv" else _json_lines(path)
    try:
        rows = [_row(path, columns, needed, problem) for columns, problem in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it in that encoding") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file ({error}): save it again") from error
    if not rows:
        raise ValueError(f"{path} has no rows: nothing to predict")
    for name in needed:
        if not any(name in row.columns for row in rows):
            raise ValueError(_missing(path, name, list(rows[0].columns)))
    return rows


def _row(path: Path, columns: dict[str, object], needed: Sequence[str], problem: Problem | None) -> Row:
    images = [columns.get(name) for name in needed if name != "text"]
    for name, value in zip(needed, images):
        if problem is None and (not isinstance(value, str) or not value):
            problem = Problem("no image", f"the column {name} holds no path")
    places = tuple(path.parent / value for value in images) if problem is None else ()
    return Row(columns, places, columns.get("text") if "text" in needed else None, problem)


def _csv_lines(path: Path, needed: Sequence[str]) -> Iterator[tuple[dict[str, object], Problem | None]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        header = reader.fieldnames or []
        for name in needed:
            if name not in header:
                raise ValueError(_missing(path, name, header))
        for columns in reader:
            more = columns.pop("", None) if "" not in header else None
            problem = Problem("more cells than columns", f"more cells than columns: {more}") if more else None
            yield {name: "" if value is None else value for name, value in columns.items()}, problem


def _json_lines(path: Path) -> Iterator[tuple[dict[str, object], Problem | None]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                columns = json.loads(line)
            except ValueError as error:
                yield {"line": number}, Problem("not JSON", f"line {number} is not JSON ({error})")
                continue
            if isinstance(columns, dict):
                yield columns, None
            else:
                yield {"line": number}, Problem("not JSON", f"line {number} holds no JSON object")


def _missing(path: Path, name: str, header: Sequence[str]) -> str:
    has = ", ".join(header) or "none"
    hint = " (its first line names the columns)" if path.suffix.lower() == ".csv" else ""
    return f"{path} has no column {name}: it has {has}{hint}"
