"""The elements of a JSON array one after another, so that an annotation file of a gigabyte costs the memory of one.

Knows files that are an array, or an object with an array under a key. Knows nothing of what the elements mean.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from meter_fast.data.prepare.plan import PrepareError

WINDOW = 1 << 22  # bytes read at a time
_SPACE = " \t\r\n"


class _Window:
    """A stretch of the file that slides on. Bytes are held as Latin-1, so that a place in the text is a place in the
    file; JSON's own signs are the same in it."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        self._decoder = json.JSONDecoder()
        self._text, self._begin, self.at = "", 0, 0
        if self._file.read(3) != b"\xef\xbb\xbf":  # a byte order mark may come first
            self._file.seek(0)
        else:
            self._begin = 3

    @property
    def place(self) -> int:
        """Bytes before what is read next."""
        return self._begin + self.at

    def _more(self) -> bool:
        fresh = self._file.read(max(WINDOW, len(self._text)))
        if fresh:
            self._text, self._begin, self.at = self._text[self.at :] + fresh.decode("latin-1"), self.place, 0
        return bool(fresh)

    def sign(self) -> str:
        """The next character that is no space, not taken; "" at the end of the file."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def take(self, *wanted: str) -> str:
        """Take the next sign, which must be one of those wanted."""
        found = self.sign()
        if found not in wanted or not found:
            here = f"{found!r} stands" if found else "the file ends"
            raise self.error(f"{here} where {' or '.join(wanted)} should")
        self.at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """The next value, its first byte and the byte after its last."""
        self.sign()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self.error(str(error)) from None
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            text = self._text[self.at : end]
            begin, self.at = self.place, end
            return (found if text.isascii() else self._decoded(text)), begin, self.place

    def _decoded(self, text: str) -> Any:
        try:
            return json.loads(text.encode("latin-1"))
        except ValueError as error:
            raise self.error(str(error)) from None

    def error(self, what: str) -> PrepareError:
        return PrepareError(f"{self.path}: no whole JSON file ({what}, byte {self.place:,}); download it again")


def elements(path: Path, key: str | None = None) -> Iterator[tuple[Any, int, int]]:
    """Each element of an array, with its first byte and the byte after its last.

    key: the name that the array has in the file's object; None where the file is the array. Raises PrepareError for
    a file that is damaged or of another form.
    """
    with open(path, "rb") as file:
        window = _Window(path, file)
        if key is not None:
            _find_array(window, key)
        window.take("[")
        if window.sign() == "]":
            return
        while True:
            yield window.value()
            if window.take(",", "]") == "]":
                return


def _find_array(window: _Window, key: str) -> None:
    """Go to the value of `key` in the file's object."""
    window.take("{")
    found = []
    while window.sign() == '"':
        name = window.value()[0]
        window.take(":")
        if name == key:
            return
        found.append(name)
        window.value()
        if window.take(",", "}") == "}":
            break
    raise PrepareError(f"{window.path}: no {key!r} in it, but {', '.join(map(repr, found)) or 'nothing'}; is it the "
                       f"right file?")  # fmt: skip


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number, from 1, and value of each line of a JSONL file; empty lines are passed over. Raises PrepareError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise PrepareError(
                        f"{path} line {number}: no JSON ({error}); one object a line is expected"
                    ) from None
