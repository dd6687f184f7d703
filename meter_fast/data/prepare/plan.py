"""What is to be written: tables, their rows in order, and what is known to be missing before a picture is read.

Knows paths and columns. Knows nothing of any data set, nor of how files are read and written.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

CAPTION_COLUMNS = pa.schema(
    [("image", pa.binary()), ("caption", pa.list_(pa.string())), ("image_id", pa.string()), ("split", pa.string())]
)


class PrepareError(ValueError):
    """Raw data that cannot be used: which file or folder, what is wrong with it, what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row before its pictures are read. pictures: a path for each picture column. values: the other columns."""

    pictures: tuple[str, ...]
    values: dict


@dataclass(frozen=True)
class LeftOut:
    """A picture or row that is not in a table. name: path or place; cause is counted, detail is listed."""

    name: str
    cause: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """One file to write, NAME.arrow.

    columns: the picture columns are the binary ones, in the order of Row.pictures. rows: gives one row for each of
    `files`, paths of the (first) pictures, whenever it is called. split: of which split's pictures it is a part.
    """

    name: str
    split: str
    columns: pa.Schema
    files: Sequence[str]
    rows: Callable[[], Iterator[Row]]

    @property
    def count(self) -> int:
        """Rows before any picture is found to be broken."""
        return len(self.files)

    def digest(self) -> str:
        """sha256 of the names of the pictures, in order: where one is added or removed, other rows are in the table."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.rpartition("/")[2].encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    @property
    def pictures(self) -> list[str]:
        """Names of the picture columns."""
        return [field.name for field in self.columns if pa.types.is_binary(field.type)]


@dataclass(frozen=True)
class Part:
    """A table that is a stretch of the rows of one that was just written. last: the last n rows; else all but them."""

    name: str
    of: str
    n: int
    last: bool


@dataclass
class Plan:
    """All of a data set.

    annotations: files that the tables follow from. wanted: by split, rows that the annotations ask for. left_out: by
    split, which of them have no picture, and what else is passed over. notes: what else was counted, to show. files:
    text files to write beside the tables.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    annotations: list[Path] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, list[LeftOut]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def add(self, table: Table, lost: Sequence[LeftOut]) -> None:
        """A table that holds all rows of its split whose pictures are there, and what is not there."""
        self.tables.append(table)
        self.wanted[table.split] = table.count + sum(one.cause == MISSING for one in lost)
        self.left_out[table.split] = list(lost)

    def add_rows(self, name: str, split: str, columns: pa.Schema, rows: Sequence[Row], lost: Sequence[LeftOut]) -> None:
        """`add` for rows at hand."""
        self.add(Table(name, split, columns, [row.pictures[0] for row in rows], lambda: iter(rows)), lost)


MISSING = "missing"
DUPLICATE = "duplicate name"  # a second file of a name; the first folder's counts


class Folders:
    """Where pictures are, by listing each folder once."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def names(self, folder: Path | str) -> frozenset[str]:
        """Names in a folder; none where it does not exist."""
        folder = str(folder)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
        return self._names[folder]

    def find(self, folders: Sequence[Path], name: str, lost: list[LeftOut]) -> str | None:
        """The path of a picture in the first of the folders that has it. What is missing, or there twice, goes to
        `lost`."""
        found = [folder for folder in folders if name in self.names(folder)]
        if not found:
            lost.append(LeftOut(f"{folders[0]}/{name}", MISSING))
            return None
        lost += [LeftOut(f"{folder}/{name}", DUPLICATE, f"{found[0]} has it, too") for folder in found[1:]]
        return f"{found[0]}/{name}"


def first_of(raw: Path, *names: str) -> Path:
    """The first of some files or folders below `raw` that is there. Raises PrepareError, naming what is there."""
    for name in names:
        if (raw / name).exists():
            return raw / name
    if not raw.is_dir():
        raise PrepareError(f"{raw} is not a folder: give the folder with the raw files")
    there = sorted(path.name for path in raw.iterdir() if not path.name.startswith("."))
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise PrepareError(f"no {' or '.join(names)} in {raw}; it holds {shown or 'nothing'}")


def field_of(value: object, name: str, path: Path, place: str) -> object:
    """A field of an annotation. Raises PrepareError where it has none."""
    if isinstance(value, dict) and name in value:
        return value[name]
    raise PrepareError(f"{path}, {place}: no {name!r} in {str(value)[:80]}; is it the right file?")
