"""How far a long call is, on standard error: a bar in place on a terminal, a line from time to time elsewhere."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from meter_fast.training.monitor import duration, rate

BAR = 24
LINE_EVERY = 10.0  # seconds, where lines are not rewritten
BAR_EVERY = 0.1


class Progress:
    """total: rows there are. stream: where people read; standard error by default."""

    def __init__(self, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self._clock = total, clock
        self._stream = sys.stderr if stream is None else stream
        self._in_place = self._stream.isatty()
        self._began = self._said = clock()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._began

    def __call__(self, done: int, failed: int) -> None:
        """So many rows are done, some of them without a result."""
        now = self._clock()
        last = self._in_place and done >= self.total
        if not last and now - self._said < (BAR_EVERY if self._in_place else LINE_EVERY):
            return
        self._said = now
        line = self.line(done, failed)
        if self._in_place:
            self._stream.write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def line(self, done: int, failed: int) -> str:
        """What is shown."""
        speed = done / max(self.seconds, 1e-9)
        rest = duration((self.total - done) / speed) if done else "unknown"
        bar = "#" * (BAR * done // self.total)
        wrong = f"  failed {failed:,}" if failed else ""
        return f"[{bar:-<{BAR}}] {done:,}/{self.total:,} rows  {rate(speed)} rows/s  ETA {rest}{wrong}"

    def close(self) -> None:
        """Leave the line of the bar."""
        if self._in_place:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
