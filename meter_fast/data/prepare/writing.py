"""One Arrow table written as its rows come: bounded memory, and visible only when complete.

Knows Arrow IPC files. Knows nothing of where rows come from. A table is written under a hidden name, flushed to the
disk, and gets its name by `publish`; a file that was left unfinished is written over.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from meter_fast.data.prepare.plan import PrepareError

BATCH_BYTES = 64 << 20  # of pictures in a record batch
BATCH_ROWS = 4096


@dataclass(frozen=True)
class Written:
    """A complete file. size: bytes. repaired: texts that held lone surrogates, now "?"."""

    rows: int
    size: int
    sha256: str
    repaired: int = 0


class _Hashed:
    """A file that is hashed as it is written, for pyarrow."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 (kept open)
        self.digest = hashlib.sha256()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


class TableWriter:
    """Writes `path`, of these columns. After `finish`, `publish` gives it its name; `abandon` removes what there is."""

    def __init__(self, path: Path, columns: pa.Schema, batch_bytes: int = BATCH_BYTES):
        self.path, self._columns, self._batch_bytes = path, columns, batch_bytes
        self._hidden = path.with_name(f".{path.name}.part")
        self._file = _Hashed(self._hidden)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), columns)
        self._rows: list[dict] = []
        self._bytes = 0
        self._count = self._repaired = 0

    def add(self, row: dict) -> None:
        """One row: a value for each column. Raises PrepareError for one that does not fit its column."""
        self._rows.append(row)
        self._bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if self._bytes >= self._batch_bytes or len(self._rows) >= BATCH_ROWS:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Rows as they are."""
        self._writer.write_batch(batch)
        self._count += batch.num_rows

    def finish(self) -> Written:
        """The file is whole and on the disk, under its hidden name."""
        self._flush()
        self._writer.close()
        self._file.close()
        return Written(self._count, self._hidden.stat().st_size, self._file.digest.hexdigest(), self._repaired)

    def publish(self) -> None:
        """Gives the finished file its name."""
        self._hidden.rename(self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Removes what was written, if it has not its name yet."""
        with contextlib.suppress(OSError):  # of a full disk
            self._file.close()
        self._hidden.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        try:
            batch = pa.RecordBatch.from_pylist(self._rows, schema=self._columns)
        except UnicodeEncodeError:
            batch = pa.RecordBatch.from_pylist([self._sound(row) for row in self._rows], schema=self._columns)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            first = self._count + 1
            raise PrepareError(f"{self.path.name}, row {first} or one of the next {len(self._rows)}: {error}") from None
        self._rows, self._bytes = [], 0
        self.add_batch(batch)

    def _sound(self, value: Any) -> Any:
        """A value whose texts can be written: JSON may hold half of a character."""
        if isinstance(value, str):
            sound = value.encode("utf-8", "replace").decode()
            self._repaired += sound != value
            return sound
        if isinstance(value, dict):
            return {name: self._sound(one) for name, one in value.items()}
        return [self._sound(one) for one in value] if isinstance(value, list) else value


def write_text(path: Path, text: str) -> None:
    """A small text file that is whole or not there."""
    hidden = path.with_name(f".{path.name}.part")
    with open(hidden, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    hidden.rename(path)


def sync_folder(folder: Path) -> None:
    """A rename in the folder survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
