"""Reads every table or shard once and tells what is broken in it, as the loader would find it.

Knows the kinds of tables by their columns, and the checks of pictures and texts. Knows nothing of how tables are
written.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from meter_fast.data.answers import AnswersError, names_in_tables
from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage, bad_image_of, check_image, open_with_pillow
from meter_fast.data.prepare.progress import Progress
from meter_fast.data.prepare.reading import process_pool
from meter_fast.data.question_tables import PUBLISHED_QUESTIONS, ArrowQuestions
from meter_fast.data.shards import ShardError, TarCaptions
from meter_fast.data.sources import PUBLISHED, SourceError, find_shards, find_tables
from meter_fast.data.tables import ArrowCaptions, BinaryColumn, TableError, check_offsets

ROWS_AT_ONCE = 1000  # that a process checks at a time
FIRST = 3  # names shown of each cause
KINDS = {  # by their columns: pictures, and texts
    "captions": (("image",), "caption"),
    "questions": (("image",), "questions"),
    "statements about two pictures": (("image_0", "image_1"), "questions"),
    "premises and hypotheses": (("image",), "sentences"),
}


@dataclass
class Found:
    """What was read, and what is wrong with it. bad_pictures, bad_texts: cause -> count and first names. without_text:
    pictures that have none, which training passes over."""

    pictures: int = 0
    texts: int = 0
    without_text: int = 0
    bad_pictures: dict[str, dict] = field(default_factory=dict)
    bad_texts: dict[str, dict] = field(default_factory=dict)

    def add(self, other: "Found") -> None:
        """Takes over what another part found."""
        self.pictures += other.pictures
        self.texts += other.texts
        self.without_text += other.without_text
        for mine, its in ((self.bad_pictures, other.bad_pictures), (self.bad_texts, other.bad_texts)):
            for cause, entry in its.items():
                _count(mine, cause, entry["count"], entry["first"])

    def share(self) -> float:
        """The larger of the shares of bad pictures and of bad texts."""
        wrong = ((self.bad_pictures, self.pictures), (self.bad_texts, self.texts))
        return max(sum(entry["count"] for entry in bad.values()) / max(1, of) for bad, of in wrong)


@dataclass
class Checked:
    """One table, or the shards of one source. error: why it cannot be opened. notes: what is no fault, counted."""

    name: str
    kind: str
    found: Found = field(default_factory=Found)
    notes: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def note(self, what: str, count: int) -> None:
        """Adds to a note; none is made of 0."""
        if count:
            self.notes[what] = self.notes.get(what, 0) + count


def check_data(
    root: Path,
    names: Sequence[str] = (),
    *,
    workers: int = 1,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    decode: bool = False,
    say: Callable[[str], None] = print,
) -> list[Checked]:
    """Checks tables and shards below `root`.

    names: tables (NAME or arrow:NAME[,NAME]), published sets (all their tables that are there) or shards:PATTERN; none
    for all .arrow and .tar files. decode: decode each picture, too; otherwise header and end are looked at, which finds
    nearly all. Raises SourceError where something named is not there.
    """
    _opened.cache_clear()  # files may have been written again since the last call
    _opened_shards.cache_clear()
    tables, shards = _named(root, names)
    units: list[tuple[Checked, int, tuple]] = []  # what it belongs to, pictures, the work
    results = []
    for file in tables:
        results.append(_open_table(file))
        if not results[-1].error:
            units += _table_units(file, results[-1])
    for name, files in shards.items():
        results.append(Checked(name, "shards"))
        units += _shard_units(files, results[-1])
    progress = Progress(sum(count for _, count, _ in units), "pictures", say)
    work = [one for _, _, one in units]
    for (result, count, _), found in zip(units, _carry_out(work, workers, max_pixels, decode), strict=True):
        result.found.add(found)
        progress.step(result.name, count)
    return results


def _named(root: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, list[Path]]]:
    """Tables, and shards by the name they were given under."""
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder")
    if not names:
        tables = sorted(path for path in root.glob("*.arrow") if not path.name.startswith("."))
        tar = sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))
        if not tables and not tar:
            raise SourceError(f"{root} holds neither .arrow nor .tar files")
        return tables, {"*.tar": tar} if tar else {}
    tables, shards = [], {}
    for name in names:
        kind, _, what = name.partition(":")
        if kind == "shards" and what:
            shards[name] = find_shards(what, root)
        elif name in PUBLISHED:
            stems = dict.fromkeys(stem for split in PUBLISHED[name].values() for stem in split.names)
            tables += find_tables(name, list(stems), (), root)
        elif name in PUBLISHED_QUESTIONS:
            stems = dict.fromkeys(stem for split in PUBLISHED_QUESTIONS[name].values() for stem in split)
            tables += find_tables(name, list(stems), (), root)
        else:
            stems = [stem.strip() for stem in (what if kind == "arrow" and what else name).split(",")]
            tables += find_tables(name, stems, stems, root)
    return list(dict.fromkeys(tables)), shards


def _open_table(file: Path) -> Checked:
    """What kind of table it is, opened as training opens it, where training does."""
    try:
        with pa.memory_map(str(file), "r") as mapped:
            opened = pa.ipc.open_file(mapped)
            columns = opened.schema.names
            rows = sum(opened.get_batch(number).num_rows for number in range(opened.num_record_batches))
    except (pa.ArrowInvalid, OSError) as error:
        return Checked(file.name, "unknown", error=f"not a complete Arrow IPC file ({error}); copy or write it again")
    kind = next((kind for kind, (images, text) in KINDS.items() if {*images, text} <= set(columns)), None)
    if kind is None:
        return Checked(file.name, "unknown", error=f"no table of pictures with texts: its columns are {columns}")
    result = Checked(file.name, kind)
    if rows == 0:
        result.error = "the table is empty; leave it out, or write it again"
        return result
    try:
        if kind == "captions":
            result.note("captions that repeat another of their picture", ArrowCaptions([file]).duplicates)
        elif kind == "questions":
            questions = ArrowQuestions([file])
            result.note("questions without an answer", questions.unanswered)
            result.note("labels that an answer has", len(names_in_tables([questions])))
        else:
            _validate(file)
    except (TableError, AnswersError) as error:
        result.error = str(error)
    return result


def _validate(file: Path) -> None:
    """Texts and labels of a table that has no reader yet. Raises TableError."""
    opened = _opened(str(file))
    for number in range(opened.num_record_batches):
        batch = opened.get_batch(number)
        for name in batch.schema.names:
            if not pa.types.is_binary(batch.column(name).type):
                try:
                    batch.column(name).validate(full=True)
                except pa.ArrowInvalid as error:
                    raise TableError(f"{file}: column {name!r} is damaged ({error}); copy the file again") from None


def _table_units(file: Path, result: Checked) -> Iterator[tuple[Checked, int, tuple]]:
    """Stretches of a table's rows."""
    opened, first = _opened(str(file)), 0
    for number in range(opened.num_record_batches):
        rows = opened.get_batch(number).num_rows
        for begin in range(0, rows, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, rows)
            pictures = (end - begin) * len(KINDS[result.kind][0])
            yield result, pictures, (_check_rows, str(file), result.kind, number, first, begin, end)
        first += rows


def _shard_units(files: Sequence[Path], result: Checked) -> Iterator[tuple[Checked, int, tuple]]:
    """Stretches of the pairs of shards; what is wrong with their members is noted."""
    names = tuple(map(str, files))
    try:
        shards = _opened_shards(names)
    except ShardError as error:
        result.error = str(error)
        return
    for problems in shards.problems.values():
        for problem, count in problems.items():
            result.note(f"members: {problem}", count)
    for begin in range(0, len(shards), ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(shards))
        yield result, end - begin, (_check_pairs, names, begin, end)


def _carry_out(units: Sequence[tuple], workers: int, max_pixels: int, decode: bool) -> Iterator[Found]:
    """What was found, in order."""
    if workers <= 1:
        for function, *arguments in units:
            yield function(*arguments, max_pixels, decode)
        return
    with process_pool(workers) as pool:
        waiting = deque(pool.submit(function, *arguments, max_pixels, decode) for function, *arguments in units)
        while waiting:
            yield waiting.popleft().result()


@lru_cache(8)
def _opened(file: str) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(file, "r"))


@lru_cache(1)
def _opened_shards(files: tuple[str, ...]) -> TarCaptions:
    return TarCaptions([Path(file) for file in files])


def _check_rows(
    file: str, kind: str, number: int, first: int, begin: int, end: int, max_pixels: int, decode: bool
) -> Found:
    """Rows begin..end of a record batch, whose first row is the file's row `first`."""
    images, text = KINDS[kind]
    batch = _opened(file).get_batch(number)
    found, name = Found(), Path(file).name
    for column in images:
        pictures = BinaryColumn(batch.column(column))
        check_offsets([(column, pictures.offsets, pictures.data.size)], name)
        for row in range(begin, end):
            _check_picture(pictures[row], lambda row=row: f"{name} row {first + row}", found, max_pixels, decode)
    texts, rows = batch.column(text).slice(begin, end - begin), np.arange(begin, end)
    while pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        rows, texts = rows[pc.list_parent_indices(texts).to_numpy(zero_copy_only=False)], texts.flatten()
    views = BinaryColumn(texts)
    for place, row in enumerate(rows.tolist()):
        _check_text(views[place].tobytes(), lambda row=row: f"{name} row {first + row}", found)
    found.without_text = end - begin - np.unique(rows).size
    _check_labels(kind, batch.slice(begin, end - begin), name, first + begin, found)
    return found


def _check_labels(kind: str, batch: pa.RecordBatch, name: str, first: int, found: Found) -> None:
    """What the readers of questions do not look at: the labels of statements and hypotheses."""
    if kind == "statements about two pictures":
        texts, column, right = "questions", "answers", ("True", "False")
    elif kind == "premises and hypotheses":
        texts, column, right = "sentences", "labels", (0, 1, 2)
    else:
        return
    said = batch.column(texts)
    labels = batch.column(column).to_pylist() if column in batch.schema.names else [None] * batch.num_rows
    for row, (count, given) in enumerate(zip(pc.list_value_length(said).to_pylist(), labels, strict=True)):
        if given is None or len(given) != count:
            _count(found.bad_texts, "not as many labels as texts", 1, [f"{name} row {first + row}"])
        elif wrong := [label for label in given if label not in right]:
            _count(found.bad_texts, "unknown label", len(wrong), [f"{name} row {first + row} ({wrong[0]!r})"])


def _check_pairs(files: tuple[str, ...], begin: int, end: int, max_pixels: int, decode: bool) -> Found:
    """Pairs begin..end of shards."""
    shards, found = _opened_shards(files), Found()
    for index in range(begin, end):
        pair = shards.read(index)
        _check_picture(pair.image, lambda pair=pair: pair.name, found, max_pixels, decode)
        _check_text(pair.text, lambda pair=pair: pair.name, found)
    return found


def _check_picture(encoded: np.ndarray, name: Callable[[], str], found: Found, max_pixels: int, decode: bool) -> None:
    found.pictures += 1
    try:
        header = check_image(encoded, max_pixels)
        if decode:
            _decode(encoded, header.format)
    except BadImage as error:
        _count(found.bad_pictures, error.cause, 1, [f"{name()} ({error.detail})"])


def _decode(encoded: np.ndarray, kind: str) -> None:
    """All pixels, by Pillow, whose decoders raise nearly anything. Raises BadImage."""
    with open_with_pillow(memoryview(encoded), kind) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise bad_image_of(error) from error


def _check_text(text: bytes | str, name: Callable[[], str], found: Found) -> None:
    found.texts += 1
    try:
        check_caption(text)
    except BadCaption as error:
        _count(found.bad_texts, error.cause, 1, [f"{name()} ({error.detail})"])


def _count(where: dict[str, dict], cause: str, count: int, first: Sequence[str]) -> None:
    entry = where.setdefault(cause, {"count": 0, "first": []})
    entry["count"] += count
    entry["first"] = [*entry["first"], *first][:FIRST]
