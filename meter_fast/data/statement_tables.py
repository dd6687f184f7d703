"""Tables of statements about one or two pictures: Arrow IPC files as METER and ViLT write NLVR2 and SNLI-VE,
memory-mapped.

Knows the columns of both, `image_0`, `image_1`, `questions`, `answers` and `image`, `sentences`, `labels`, and their
file names and splits. Knows nothing of order or tokens.

What is in memory per row is one integer, and per statement one byte.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meter_fast.data.sources import Sources, open_tables
from meter_fast.data.tables import (
    BinaryColumn,
    TableError,
    TextRuns,
    check_offsets,
    has_columns,
    open_record_batches,
    run_starts,
)

IMAGE = (pa.binary(), pa.large_binary())
TEXTS = (pa.list_(pa.string()), pa.list_(pa.large_string()))


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement as it lies on disk.

    images: uint8 [n] each, the encoded pictures, views of the mapped file: one, or of NLVR2 left and right. text: what
    is said of them, of SNLI-VE the hypothesis, stripped; bytes that are not UTF-8 come as lone surrogates. name: file,
    row and number. label: NLVR2 0 false, 1 true; SNLI-VE 0 contradiction, 1 neutral, 2 entailment. pair: of NLVR2 the
    identifier of the two pictures, None where the table has none. number: of the statement in its row.
    """

    images: tuple[np.ndarray, ...]
    text: str
    name: str
    label: int
    pair: str | None
    number: int

    @property
    def image(self) -> np.ndarray:
        """The first picture."""
        return self.images[0]


@dataclass(frozen=True)
class StatementTask:
    """A data set of statements about pictures.

    columns: name -> types. images: those of the pictures. texts, shown: what a table holds, and of what. labels: names
    of the classes, in order. splits: of the published data set, split -> file stems. read: the statements of a record
    batch, checked; given a name for messages.
    """

    columns: Mapping[str, Sequence[pa.DataType]]
    images: tuple[str, ...]
    texts: str
    shown: str
    labels: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    read: Callable[[pa.RecordBatch, str], "_Read"]


@dataclass(frozen=True)
class _Read:
    """first [n+1]: where each row's statements start, and where the last ones end. texts: strings, of which statement j
    counted from the batch's first is number `begin` + `step` * j. labels [n] int8: of all statements. pairs: of each
    row its identifier, where there are any."""

    first: np.ndarray
    texts: BinaryColumn
    begin: int
    step: int
    labels: np.ndarray
    pairs: pa.Array | None = None


def _read_nlvr2(table: pa.RecordBatch, where: str) -> _Read:
    questions, answers = table.column("questions"), table.column("answers")
    first, texts = _runs_of("questions", questions, where), BinaryColumn(questions.values)
    check_offsets([("questions (their strings)", texts.offsets, texts.data.size)], where)
    _same_lengths(first, "questions", answers, "answers", where)
    said = answers.flatten()
    other = [word for word in pc.unique(said).to_pylist() if word not in ("True", "False")]
    if other:
        raise TableError(f"{where}: an answer is {other[0]!r}, where it should be 'True' or 'False'; write it again")
    labels = pc.equal(said, "True").to_numpy(zero_copy_only=False).astype(np.int8)
    pairs = table.column("identifier") if "identifier" in table.schema.names else None
    return _Read(first, texts, int(first[0]), 1, labels, pairs)


def _read_snli(table: pa.RecordBatch, where: str) -> _Read:
    sentences, labels = table.column("sentences"), table.column("labels")
    first = _runs_of("sentences", sentences, where)
    inner = _runs_of("sentences (their pairs)", sentences.values, where)[first[0] : first[-1] + 1]
    if np.any(np.diff(inner) != 2):
        raise TableError(f"{where}: some sentences are no pair of premise and hypothesis; write the table again")
    texts = BinaryColumn(sentences.values.values)
    check_offsets([("sentences (their strings)", texts.offsets, texts.data.size)], where)
    _same_lengths(first, "sentences", labels, "labels", where)
    values = labels.flatten()
    if values.null_count or not pc.all(pc.is_in(values, pa.array([0, 1, 2], values.type)), min_count=0).as_py():
        raise TableError(f"{where}: labels are 0 (contradiction), 1 (neutral) and 2 (entailment), this table has "
                         f"{pc.unique(values).to_pylist()[:6]}; write it again")  # fmt: skip
    return _Read(first, texts, int(inner[0]) + 1, 2, values.to_numpy(zero_copy_only=False).astype(np.int8))


TASKS = {
    "nlvr2": StatementTask(
        {"image_0": IMAGE, "image_1": IMAGE, "questions": TEXTS, "answers": (pa.list_(pa.string()),)},
        images=("image_0", "image_1"),
        texts="statements",
        shown="pairs of pictures",
        labels=("false", "true"),
        # As published, dev and test1 are one split; the published run chooses its checkpoint by dev alone. To keep
        # test1 out of that name the table: "arrow:nlvr2_dev".
        splits={"train": ("nlvr2_train",), "val": ("nlvr2_dev", "nlvr2_test1"), "test": ("nlvr2_dev", "nlvr2_test1")},
        read=_read_nlvr2,
    ),
    "snli_ve": StatementTask(
        {
            "image": IMAGE,
            "sentences": (pa.list_(pa.list_(pa.string())), pa.list_(pa.list_(pa.large_string()))),
            "labels": (pa.list_(pa.int64()),),
        },
        images=("image",),
        texts="hypotheses",
        shown="pictures",
        labels=("contradiction", "neutral", "entailment"),
        splits={"train": ("snli_train",), "val": ("snli_dev", "snli_test"), "test": ("snli_dev", "snli_test")},
        read=_read_snli,
    ),
}


class ArrowStatements:
    """The statements of one or more tables of a task, in file, row and statement order.

    Raises TableError: a file that is no uncompressed Arrow IPC file, lacks columns, has others' types or labels that
    the task does not know, or where no statement is in any table.
    """

    duplicates = 0

    def __init__(self, files: Sequence[Path], task: str):
        self.files, self._task = [Path(file) for file in files], TASKS[task]
        self._batches: list[tuple[tuple[BinaryColumn, ...], _Read]] = []
        self._where: list[tuple[int, int]] = []  # of each batch: its file, and the row of the file that it starts at
        counts = []
        for number, file in enumerate(self.files):
            row, fits = 0, partial(has_columns, columns=self._task.columns, what=self.texts)
            for table in open_record_batches(file, fits, self._task.images[0]):
                images = tuple(BinaryColumn(table.column(name)) for name in self._task.images)
                check_offsets(
                    ((name, column.offsets, column.data.size) for name, column in zip(self._task.images, images,
                                                                                      strict=True)), str(file)
                )  # fmt: skip
                self._batches.append((images, self._task.read(table, str(file))))
                self._where.append((number, row))
                counts.append(np.diff(self._batches[-1][1].first))
                row += table.num_rows
        self._runs = TextRuns(counts)
        if len(self) == 0:
            raise TableError(f"{', '.join(map(str, self.files))}: {self.pictures} {self.shown} and not one of the "
                             f"{self.texts}; choose others")  # fmt: skip

    def __len__(self) -> int:
        return self._runs.texts

    @property
    def pictures(self) -> int:
        """Number of rows: of pictures, or of pairs of them."""
        return self._runs.rows

    @property
    def texts(self) -> str:
        """What a table holds, in words."""
        return self._task.texts

    @property
    def shown(self) -> str:
        """What a row shows, in words."""
        return self._task.shown

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """indices [n] int64 of statements -> [n] int64: which row each is of, 0..pictures-1."""
        return self._runs.rows_of(np.asarray(indices, np.int64))

    def read(self, index: int) -> Statement:
        """Statement `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"statement {index} of {len(self)}")
        at, row, within = self._runs.find(index)
        (images, read), (number, start) = self._batches[at], self._where[at]
        place = int(read.first[row] - read.first[0]) + within
        text = read.texts[read.begin + read.step * place].tobytes().decode("utf-8", "surrogateescape")
        name = f"{self.files[number].name} row {start + row} statement {within}"
        pair = None if read.pairs is None else read.pairs[row].as_py()
        shown = tuple(column[row] for column in images)
        return Statement(shown, text.strip(), name, int(read.labels[place]), pair, within)


def open_statements(
    task: str, names: Sequence[str], root: str | Path, split: str = "train", weights: Sequence[float] | None = None
) -> Sources:
    """Open tables of "nlvr2" or "snli_ve" below `root`: by the task's own name (the published tables of `split`), or
    "arrow:NAME[,NAME]". weights: as `open_sources`. Raises SourceError or TableError."""
    published = {task: TASKS[task].splits}
    opened = open_tables(names, root, split, published, partial(ArrowStatements, task=task), TASKS[task].texts)
    return Sources(opened, list(weights) if weights else None)


def _runs_of(name: str, lists: pa.Array, where: str) -> np.ndarray:
    """`run_starts`, checked."""
    first = run_starts(lists)
    check_offsets([(name, first, len(lists.values))], where)
    return first


def _same_lengths(first: np.ndarray, name: str, lists: pa.Array, other: str, where: str) -> None:
    """Raises TableError where a column is damaged or has not as many values a row as there are statements."""
    try:
        lists.validate(full=True)
    except pa.ArrowInvalid as error:
        raise TableError(f"{where}: column {other!r} is damaged ({error}); copy the file again") from None
    if np.any(np.diff(run_starts(lists)) != np.diff(first)):
        raise TableError(f"{where}: some rows have not as many {other} as {name}; write the table again")
