"""Tables of questions about pictures: Arrow IPC files as METER and ViLT write VQAv2, memory-mapped.

Knows the columns `image`, `questions`, `answers`, `answer_labels`, `answer_scores` and `question_id`, and the file
names and splits of VQAv2. Knows nothing of order, tokens, or of how many answers a model knows.

A table without answers (a test split) has empty lists in the three columns, often of type null; its questions can be
read, and have no answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

# As published, training reads val, too, so that a score on val says nothing (METER, vqav2_dataset.py). To keep val out
# of training name the tables: "arrow:vqav2_train".
PUBLISHED_QUESTIONS = {
    "vqa": {"train": ("vqav2_train", "vqav2_val"), "val": ("vqav2_val",), "test": ("vqav2_test",)},
}
COLUMNS = {
    "image": (pa.binary(), pa.large_binary()),
    "questions": (pa.list_(pa.string()), pa.list_(pa.large_string())),
    "question_id": (pa.list_(pa.int64()),),
    "answers": (pa.list_(pa.list_(pa.string())),),
    "answer_labels": (pa.list_(pa.list_(pa.int64())),),
    "answer_scores": (pa.list_(pa.list_(pa.float64())),),
}
ANSWER_COLUMNS = ("answers", "answer_labels", "answer_scores")


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it lies on disk.

    image: uint8 [n], the encoded picture, a view of the mapped file. text: the question; bytes that are not UTF-8 come
    as lone surrogates. name: file, row and number.
    answers, labels, scores: the answers that count, with the number of each in the label space and its score.
    """

    image: np.ndarray
    text: str
    name: str
    question_id: int
    answers: tuple[str, ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The one picture that the text is about."""
        return (self.image,)


class _Batch:
    """One record batch: pictures, and for each its run of questions. Answers are those of question j at place j."""

    def __init__(self, table: pa.RecordBatch, where: str):
        self.image = BinaryColumn(table.column("image"))
        questions = table.column("questions")
        self.first = run_starts(questions)
        self.text = BinaryColumn(questions.values)
        check_offsets(
            (
                ("image", self.image.offsets, self.image.data.size),
                ("questions", self.first, len(questions.values)),
                ("questions (their strings)", self.text.offsets, self.text.data.size),
            ),
            where,
        )
        try:
            for name in ("question_id", *ANSWER_COLUMNS):
                table.column(name).validate(full=True)
        except pa.ArrowInvalid as error:
            raise TableError(f"{where}: column {name!r} is damaged ({error}); copy the file again") from None
        self.ids = table.column("question_id").values
        self.id_starts = run_starts(table.column("question_id"))
        columns = {name: table.column(name) for name in ANSWER_COLUMNS}
        self.answered = all(_is_nested(column.type) for column in columns.values()) and any(
            run_starts(column)[0] < run_starts(column)[-1] for column in columns.values()
        )
        self.answers = self.labels = self.scores = None
        if np.any(np.diff(self.id_starts) != np.diff(self.first)):
            raise TableError(f"{where}: some rows have not as many question_id as questions; write the table again")
        if not self.answered:
            return
        for name, column in columns.items():
            if np.any(np.diff(run_starts(column)) != np.diff(self.first)):
                raise TableError(f"{where}: some rows have not as many {name} as questions; write the table again")
        self.answers, self.labels, self.scores = (columns[name].values for name in ANSWER_COLUMNS)
        self.answer_starts = {name: run_starts(column)[:1] for name, column in columns.items()}
        counts = {name: np.diff(run_starts(column.values)) for name, column in columns.items()}
        if any(not np.array_equal(counts["answer_labels"], other) for other in counts.values()):
            raise TableError(f"{where}: answers, answer_labels and answer_scores differ in length; write it again")

    @property
    def count(self) -> int:
        """Questions."""
        return int(self.first[-1] - self.first[0])

    def unanswered(self) -> np.ndarray:
        """Places [n] int64 of questions without answers, counted from the batch's first."""
        if not self.answered:
            return np.arange(self.count, dtype=np.int64)
        begin = int(self.answer_starts["answer_labels"][0])
        counts = np.diff(run_starts(self.labels)[begin : begin + self.count + 1])
        return np.flatnonzero(counts == 0)

    def answers_of(self, place: int) -> tuple[tuple, tuple, tuple]:
        """answers, labels and scores of the question at `place`, counted from the batch's first."""
        if not self.answered:
            return (), (), ()
        columns = (self.answers, self.labels, self.scores)
        starts = (int(self.answer_starts[name][0]) for name in ANSWER_COLUMNS)
        return tuple(tuple(column[start + place].as_py() or ()) for column, start in zip(columns, starts, strict=True))


class ArrowQuestions:
    """The questions of one or more tables, in file, row and question order.

    answered_only: leave out questions without answers (training); `unanswered` says how many there are. Raises
    TableError: a file that is no uncompressed Arrow IPC file, lacks columns or has others' types, or where no question
    is left.
    """

    duplicates = 0
    texts = "questions"

    def __init__(self, files: Sequence[Path], answered_only: bool = False):
        self.files = [Path(file) for file in files]
        self._batches: list[_Batch] = []
        self._where: list[tuple[int, int]] = []  # of each batch: its file, and the row of the file that it starts at
        counts, unanswered, questions = [], [], 0
        for number, file in enumerate(self.files):
            row = 0
            for table in open_record_batches(file, _is_question_table):
                batch = _Batch(table, str(file))
                self._batches.append(batch)
                self._where.append((number, row))
                counts.append(np.diff(batch.first))
                unanswered.append(batch.unanswered() + questions)
                questions += batch.count
                row += len(counts[-1])
        self._runs = TextRuns(counts)
        without = np.concatenate([*unanswered, np.zeros(0, np.int64)]).astype(np.int64)
        self.unanswered = without.size
        self._removed = without if answered_only else without[:0]
        self._kept_before = self._removed - np.arange(self._removed.size)
        if len(self) == 0:
            what = "not one question with an answer" if questions else "not one question"
            raise TableError(f"{', '.join(map(str, self.files))}: {self.pictures} pictures and {what}; choose others")

    def __len__(self) -> int:
        return self._runs.texts - self._removed.size

    @property
    def left_out(self) -> int:
        """Questions left out because they have no answer."""
        return self._removed.size

    @property
    def pictures(self) -> int:
        """Number of pictures (rows)."""
        return self._runs.rows

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """indices [n] int64 of questions -> [n] int64: which picture each is about, 0..pictures-1."""
        return self._runs.rows_of(self._places(np.asarray(indices, np.int64)))

    def read(self, index: int) -> Question:
        """Question `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        at, row, within = self._runs.find(int(self._places(np.int64(index))))
        batch, (number, start) = self._batches[at], self._where[at]
        text = batch.text[int(batch.first[row]) + within].tobytes().decode("utf-8", "surrogateescape")
        identity = batch.ids[int(batch.id_starts[row]) + within].as_py()
        answers, labels, scores = batch.answers_of(int(batch.first[row] - batch.first[0]) + within)
        name = f"{self.files[number].name} row {start + row} question {within}"
        return Question(batch.image[row], text, name, identity, answers, labels, scores)

    def question_ids(self) -> np.ndarray:
        """question_id of every question, [n] int64, in order. Raises TableError where one has none."""
        found = [batch.ids.slice(int(batch.id_starts[0]), batch.count) for batch in self._batches]
        if any(ids.null_count for ids in found):
            raise TableError(f"{', '.join(map(str, self.files))}: some questions have no question_id; write it again")
        every = np.concatenate([ids.to_numpy() for ids in found])
        return np.delete(every, self._removed)

    def answer_names(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str | None]]]:
        """Of each record batch: label [n] int64 and text [n] int64 of all answers, and the texts that the second number
        counts. For the label space; few texts are given very often."""
        for batch in self._batches:
            if batch.answered:
                texts = pc.dictionary_encode(batch.answers.flatten(), null_encoding="encode")
                labels = batch.labels.flatten().to_numpy(zero_copy_only=False)
                yield labels, texts.indices.to_numpy(zero_copy_only=False), texts.dictionary.to_pylist()

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of kept questions -> their places among all."""
        return indices + np.searchsorted(self._kept_before, indices, side="right")


def open_questions(
    names: Sequence[str],
    root: str | Path,
    split: str = "train",
    weights: Sequence[float] | None = None,
    answered_only: bool = False,
) -> Sources:
    """Open tables of questions below `root`: "vqa" (the published tables of `split`) or "arrow:NAME[,NAME]".

    answered_only: see ArrowQuestions. weights: as `open_sources`. Raises SourceError or TableError.
    """
    opened = open_tables(
        names, root, split, PUBLISHED_QUESTIONS, lambda files: ArrowQuestions(files, answered_only), "questions"
    )
    return Sources(opened, list(weights) if weights else None)


def _is_nested(kind: pa.DataType) -> bool:
    """A list of lists of values, not of nulls."""
    return (
        pa.types.is_list(kind)
        and pa.types.is_list(kind.value_type)
        and not pa.types.is_null(kind.value_type.value_type)
    )


def _is_question_table(file: Path, schema: pa.Schema) -> bool:
    return has_columns(file, schema, COLUMNS, "questions", ANSWER_COLUMNS)
