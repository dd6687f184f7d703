"""How far a long command is: a line every few seconds, with the rate and the time that is left."""

import time
from collections.abc import Callable

SAY_EVERY = 10.0  # seconds between two lines


class Progress:
    """total: how many there are of what `noun` names. say: takes a line."""

    def __init__(self, total: int, noun: str, say: Callable[[str], None]):
        self._total, self._noun, self._say = total, noun, say
        self._done = self._bytes = 0
        self._began = self._said = time.monotonic()

    def step(self, name: str, count: int, size: int = 0) -> None:
        """`count` more, of `size` bytes; name: what is at work."""
        self._done += count
        self._bytes += size
        now = time.monotonic()
        if now - self._said >= SAY_EVERY:
            self._said = now
            self._say(f"{name}: {self.line(now - self._began)}")

    def line(self, seconds: float) -> str:
        """After so many seconds."""
        rate = self._done / seconds
        speed = f", {self._bytes / seconds / 1e6:,.1f} MB/s" if self._bytes else ""
        left = f", {duration((self._total - self._done) / rate)} left" if rate else ""
        return f"{self._done:,} of {self._total:,} {self._noun}, {rate:,.0f} a second{speed}{left}"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
