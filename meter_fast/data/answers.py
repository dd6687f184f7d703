"""The answers that a model chooses from: label 0, 1, 2, ... -> text.

Knows the labels and answers of tables of questions, and JSON files. Knows nothing of pictures or models.

The label space is made once, by whoever writes the tables (3129 answers in VQAv2, METER `write_vqa.py`); here it is
read back from the tables, as the published code does before it predicts, or from a file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meter_fast.data.question_tables import ArrowQuestions


class AnswersError(ValueError):
    """A label space that does not fit: where, which label, what to do."""


@dataclass(frozen=True)
class Answers:
    """names: the text of each label, None where no table holds it."""

    names: tuple[str | None, ...]

    def __len__(self) -> int:
        """A, the number of answers."""
        return len(self.names)

    @property
    def unnamed(self) -> int:
        """Labels below the highest that no table holds."""
        return sum(name is None for name in self.names)

    def hash(self) -> str:
        """sha256 over all names and their order."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """As the file holds it: a JSON list."""
        return json.dumps(list(self.names), ensure_ascii=False, indent=0) + "\n"

    def check(self, found: dict[int, str], where: str) -> None:
        """Raise AnswersError if `found`, label -> text, speaks of other answers than these."""
        for label, name in sorted(found.items()):
            if label >= len(self.names):
                raise AnswersError(f"{where} has label {label} ({name!r}), but there are {len(self)} answers: it "
                                   f"belongs to another label space")  # fmt: skip
            if self.names[label] not in (None, name):
                raise AnswersError(f"{where} calls label {label} {name!r}, where it should be {self.names[label]!r}: "
                                   f"it belongs to another label space")  # fmt: skip


def names_in_tables(tables: Iterable[ArrowQuestions]) -> dict[int, str]:
    """label -> text of all answers in the tables. Raises AnswersError for a label of two texts, or below 0."""
    names: dict[int, str] = {}
    for table in tables:
        where = ", ".join(file.name for file in table.files)
        for labels, codes, texts in table.answer_names():
            for label, code in np.unique(np.stack([labels, codes]), axis=1).T.tolist():
                text = texts[code]
                if label < 0 or text is None:
                    raise AnswersError(f"{where}: label {label} of {text!r}: labels are 0 or more and have a text; "
                                       f"write the table again")  # fmt: skip
                if names.setdefault(label, text) != text:
                    raise AnswersError(f"{where}: label {label} is both {names[label]!r} and {text!r}; write the "
                                       f"tables again with one label space")  # fmt: skip
    return names


def most_frequent(tables: Iterable[ArrowQuestions]) -> str | None:
    """The text that most questions of the tables have among their answers; None where no question has one."""
    counts: Counter[str] = Counter()
    for table in tables:
        for _, codes, texts in table.answer_names():
            for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
                counts[texts[code]] += int(count)
    return max(counts, key=lambda text: (counts[text], text), default=None)


def find_answers(tables: Sequence[ArrowQuestions], file: str = "") -> Answers:
    """The label space of a run: from `file` (data.answers), against which the tables are checked, or from the tables.

    Raises AnswersError, also where no table has an answer and there is no file.
    """
    found = names_in_tables(tables)
    if file:
        answers = read_answers(file)
        answers.check(found, "a table of data.root")
        return answers
    if not found:
        raise AnswersError("the tables hold no answers: name tables with answers, or give data.answers=FILE")
    return Answers(tuple(found.get(label) for label in range(max(found) + 1)))


def read_answers(path: str | Path) -> Answers:
    """The label space of a JSON file: a list of texts, label 0 first, null where a label has none.

    Raises AnswersError.
    """
    path = Path(path)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnswersError(f"data.answers: cannot read {path} ({error}): give a JSON list of texts") from None
    if not isinstance(names, list) or not names or not all(name is None or isinstance(name, str) for name in names):
        raise AnswersError(f"data.answers: {path} is not a JSON list of texts, label 0 first")
    return Answers(tuple(names))
