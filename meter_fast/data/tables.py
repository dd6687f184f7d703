"""Caption tables: Arrow IPC files with the columns that METER and ViLT write, memory-mapped.

Knows the columns `image` (binary, the encoded file), `caption` (list of strings) and, if there is one, `image_id`; how
captions are counted and de-duplicated, and how one pair is read. Knows nothing of data set names and splits
(sources.py), of order, or of what an encoded picture holds.

What is in memory per picture is one integer; captions and pictures stay in the page cache. A table that shrinks while
it is mapped ends the process (SIGBUS): replace files by renaming a new one over them, never in place.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CAPTIONS_AT_ONCE = 1 << 18  # captions compared in one go while de-duplicating: bounds the memory of opening a table


class TableError(ValueError):
    """A table that cannot be used: which file, what is wrong with it, what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One (picture, caption) pair as it lies on disk.

    image: uint8 [n], the encoded picture (a view of the mapped file where the store allows it; do not write to it)
    text: the caption; bytes that are not UTF-8 come as lone surrogates ("surrogateescape"), for the caption check
    name: file and row, for messages
    """

    image: np.ndarray
    text: str
    name: str

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The one picture that the text is about."""
        return (self.image,)


class BinaryColumn:
    """A binary or string column of one record batch: its byte strings as views."""

    def __init__(self, array: pa.Array):
        wide = array.type in (pa.large_binary(), pa.large_string())
        _, offsets, data = array.buffers()
        kind = np.dtype(np.int64 if wide else np.int32)
        self.offsets = _view(offsets, kind)[array.offset : array.offset + len(array) + 1]
        self.data = _view(data, np.dtype(np.uint8))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.data[self.offsets[row] : self.offsets[row + 1]]


class _Batch:
    """One record batch: the pictures, and for each its run of captions."""

    def __init__(self, image: pa.Array, caption: pa.Array, name: pa.Array | None):
        self.image = BinaryColumn(image)
        self.name = name
        self.first = run_starts(caption)
        self.captions = caption.values
        self.text = BinaryColumn(self.captions)

    def check(self, where: str) -> None:
        """Offsets that go backwards or leave the batch would read foreign bytes: refuse them before any use."""
        columns = (
            ("image", self.image.offsets, self.image.data.size),
            ("caption", self.first, len(self.captions)),
            ("caption (its strings)", self.text.offsets, self.text.data.size),
        )
        check_offsets(columns, where)

    def duplicates(self) -> np.ndarray:
        """Places [n] int64 of captions that repeat an earlier caption of the same picture, counted from the batch's
        first caption."""
        counts = np.diff(self.first)
        if counts.size == 0 or counts.max() < 2:
            return np.zeros(0, np.int64)
        found = []
        row = 0
        while row < counts.size:
            stop = int(np.searchsorted(self.first, self.first[row] + CAPTIONS_AT_ONCE, side="right")) - 1
            stop = min(max(stop, row + 1), counts.size)
            begin, end = int(self.first[row]), int(self.first[stop])
            encoded = pc.dictionary_encode(self.captions.slice(begin, end - begin), null_encoding="encode")
            code = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            owner = np.repeat(np.arange(stop - row, dtype=np.int64), counts[row:stop])
            key = owner * max(1, len(encoded.dictionary)) + code
            order = np.argsort(key, kind="stable")  # stable: the first of equal captions is the one that stays
            again = order[1:][key[order[1:]] == key[order[:-1]]]
            found.append(np.sort(again) + (begin - int(self.first[0])))
            row = stop
        return np.concatenate(found)


def check_offsets(columns: Iterable[tuple[str, np.ndarray, int]], where: str) -> None:
    """Raise TableError for offsets of a column, (name, offsets [n+1], what they must not exceed), that lead astray."""
    for column, offsets, end in columns:
        if offsets.size and (offsets[0] < 0 or offsets[-1] > end or _descends(offsets)):
            raise TableError(f"{where}: damaged offsets in column {column}; copy the file again")


class TextRuns:
    """Where the texts of several record batches lie, numbered on over all of them. counts: of each batch, how many
    texts each of its rows has [n]."""

    def __init__(self, counts: Sequence[np.ndarray]):
        self._first = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]), dtype=np.int64)
        self._first_row = np.cumsum([0, *(one.size for one in counts)]).tolist()

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return self._first.size - 1

    @property
    def texts(self) -> int:
        """Texts of all batches."""
        return int(self._first[-1])

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """places [n] int64 of texts -> [n] int64: which row each belongs to, 0..rows-1."""
        return np.searchsorted(self._first, places, side="right") - 1

    def find(self, place: int) -> tuple[int, int, int]:
        """Of one text: its batch, its row in that, and its number among the texts of the row."""
        row = int(self.rows_of(np.int64(place)))
        batch = bisect_right(self._first_row, row) - 1
        return batch, row - self._first_row[batch], place - int(self._first[row])


class ArrowCaptions:
    """The (picture, caption) pairs of one or more tables, in file, row and caption order.

    Captions that repeat within a picture are left out, as published (METER base_dataset.py:65), but the order of the
    remaining ones is the file's: the published `set` gives every process another order.

    Raises TableError: a file that is not an uncompressed Arrow IPC file, lacks the columns or has others' types, or
    holds no pair at all.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = [Path(file) for file in files]
        self._batches: list[_Batch] = []
        self._where: list[tuple[int, int]] = []  # of each batch: its file, and the row of the file that it starts at
        counts, removed, captions = [], [], 0
        for number, file in enumerate(self.files):
            row = 0
            for batch in _open_batches(file):
                self._batches.append(batch)
                self._where.append((number, row))
                counts.append(np.diff(batch.first))
                removed.append(batch.duplicates() + captions)
                captions += int(counts[-1].sum())
                row += counts[-1].size
            if row == 0:
                raise TableError(f"{file}: the table is empty (0 rows); write it again or leave it out")
        starts = np.zeros(sum(c.size for c in counts) + 1, np.int32 if captions < 2**31 else np.int64)
        np.cumsum(np.concatenate(counts), out=starts[1:])
        self._first = starts  # [pictures + 1] place of each picture's first caption
        self._first_row = np.cumsum([0] + [c.size for c in counts]).tolist()  # first picture of each batch
        self._removed = np.concatenate(removed)
        # Of the kept captions, how many come before each removed one: with it, the k-th kept one is found by bisection.
        self._kept_before = self._removed - np.arange(self._removed.size)
        if len(self) == 0:
            raise TableError(f"{', '.join(map(str, self.files))}: {self.pictures} pictures and not one caption")

    def __len__(self) -> int:
        return int(self._first[-1]) - self._removed.size

    @property
    def pictures(self) -> int:
        """Number of pictures (rows), those without captions included."""
        return self._first.size - 1

    @property
    def duplicates(self) -> int:
        """Number of captions left out because they repeat another one of their picture."""
        return self._removed.size

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """indices [n] int64 of pairs -> [n] int64: which picture each shows, 0..pictures-1."""
        places = self._places(np.asarray(indices, np.int64)).astype(self._first.dtype)
        return np.searchsorted(self._first, places, side="right").astype(np.int64) - 1

    def read(self, index: int) -> Sample:
        """Pair `index`; the picture's bytes are a view of the mapped file."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        place = int(self._places(np.int64(index)))
        at, row, picture = self._row_of(place)
        batch, (number, start) = self._batches[at], self._where[at]
        name = f"{self.files[number].name} row {start + row}"
        text = batch.text[int(batch.first[row]) + place - int(self._first[picture])]
        return Sample(batch.image[row], _decoded(text), name)

    def picture(self, index: int) -> tuple[str | int | None, list[str]]:
        """Of the picture of pair `index`: what the table's column image_id says, if there is one, and all captions,
        repeated ones too."""
        at, row, _ = self._row_of(int(self._places(np.int64(index))))
        batch = self._batches[at]
        name = None if batch.name is None else batch.name[row].as_py()
        texts = [_decoded(batch.text[n]) for n in range(int(batch.first[row]), int(batch.first[row + 1]))]
        return (name if isinstance(name, str | int) else None), texts

    def _row_of(self, place: int) -> tuple[int, int, int]:
        """The batch, the row in it, and the number of the picture that has the caption at `place`."""
        picture = int(np.searchsorted(self._first, self._first.dtype.type(place), side="right")) - 1
        at = bisect_right(self._first_row, picture) - 1
        return at, picture - self._first_row[at], picture

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """Numbers of kept captions -> their places among all captions."""
        return indices + np.searchsorted(self._kept_before, indices, side="right")


def _decoded(text: np.ndarray) -> str:
    return text.tobytes().decode("utf-8", "surrogateescape")


def open_record_batches(
    file: Path, fits: Callable[[Path, pa.Schema], bool], image: str = "image"
) -> Iterator[pa.RecordBatch]:
    """The record batches of one table that hold rows, mapped.

    fits: False for a table without rows or types, raises TableError for columns that are not those wanted. image: a
    column of pictures. Raises TableError for a file that is damaged, incomplete or compressed.
    """
    try:
        mapped = pa.memory_map(str(file), "r")
        schema = pa.ipc.open_file(mapped).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise TableError(
            f"{file}: not a complete Arrow IPC file ({error}); copy it again, or write it with pyarrow.ipc.new_file"
        ) from None
    if not fits(file, schema):
        return
    reader = pa.ipc.open_file(mapped)  # all columns: asking for some of them (included_fields) makes pyarrow copy
    mapped.seek(0)
    whole = mapped.read_buffer(mapped.size())
    for number in range(reader.num_record_batches):
        try:
            table = reader.get_batch(number)
            table.validate()
        except (pa.ArrowInvalid, OSError) as error:
            raise TableError(f"{file}: record batch {number} is damaged ({error}); copy the file again") from None
        if table.num_rows == 0:
            continue
        _refuse_compressed(file, table.column(image), whole)
        yield table


def _open_batches(file: Path) -> list[_Batch]:
    """The record batches of a caption table that hold rows, checked."""
    batches = []
    for number, table in enumerate(open_record_batches(file, _is_caption_table)):
        named = "image_id" in table.schema.names
        batch = _Batch(table.column("image"), table.column("caption"), table.column("image_id") if named else None)
        batch.check(f"{file}, record batch {number}")
        batches.append(batch)
    return batches


def _is_caption_table(file: Path, schema: pa.Schema) -> bool:
    return all([_has_type(file, schema, "image"), _has_type(file, schema, "caption")])


def _has_type(file: Path, schema: pa.Schema, name: str) -> bool:
    """True for a column of the right type, False for the untyped one of an empty table; others are refused."""
    index = schema.get_field_index(name)
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    if index < 0:
        raise TableError(f"{file}: no column {name!r}; a caption table has 'image' and 'caption', this one {found}")
    kind = schema.field(index).type
    if pa.types.is_null(kind):
        return False
    if name == "image":
        fits, expected = kind in (pa.binary(), pa.large_binary()), "binary"
    else:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        fits = is_list and kind.value_type in (pa.string(), pa.large_string())
        expected = "list<string>"
    if not fits:
        raise TableError(f"{file}: column {name!r} is {kind}, expected {expected}; the columns are {found}")
    return True


def has_columns(
    file: Path, schema: pa.Schema, columns: Mapping[str, Sequence[pa.DataType]], what: str, empty: Sequence[str] = ()
) -> bool:
    """True for a table with these columns, each of one of its types; False for one whose types are null because it is
    empty. empty: columns that may be lists of null. Raises TableError for others, which are no table of `what`."""
    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
    for name, kinds in columns.items():
        index = schema.get_field_index(name)
        if index < 0:
            raise TableError(
                f"{file}: no column {name!r}; a table of {what} has {', '.join(columns)}; this one {found}"
            )
        kind = schema.field(index).type
        if pa.types.is_null(kind):
            return False
        nothing = name in empty and kind in (pa.list_(pa.null()), pa.list_(pa.list_(pa.null())))
        if kind not in kinds and not nothing:
            expected = str(kinds[0]).replace("item: ", "")
            raise TableError(f"{file}: column {name!r} is {kind}, expected {expected}; the columns are {found}")
    return True


def _refuse_compressed(file: Path, image: pa.Array, whole: pa.Buffer) -> None:
    """Compressed buffers are unpacked into memory, batch after batch: the whole table would end up there."""
    address = image.buffers()[1].address
    if not whole.address <= address < whole.address + whole.size:
        raise TableError(
            f"{file}: compressed, so it cannot be mapped and would fill the memory; "
            "write it without compression (pyarrow.ipc.new_file, or feather with compression='uncompressed')"
        )


def run_starts(lists: pa.Array) -> np.ndarray:
    """Where each list of a column of n lists starts among `lists.values`, and where the last ends: [n+1], a view."""
    kind = np.dtype(np.int64 if pa.types.is_large_list(lists.type) else np.int32)
    return _view(lists.buffers()[1], kind)[lists.offset : lists.offset + len(lists) + 1]


def _view(buffer: pa.Buffer | None, kind: np.dtype) -> np.ndarray:
    """A numpy view of an Arrow buffer; Arrow may leave out the buffers of empty columns."""
    if buffer is None:
        return np.zeros(1 if kind.itemsize > 1 else 0, kind)
    return np.frombuffer(buffer, kind, count=buffer.size // kind.itemsize)


def _descends(offsets: np.ndarray) -> bool:
    """Whether a sequence goes down anywhere, looked at in pieces to keep the memory flat."""
    step = CAPTIONS_AT_ONCE
    return any(bool((np.diff(offsets[at : at + step + 1]) < 0).any()) for at in range(0, offsets.size, step))
