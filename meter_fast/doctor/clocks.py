"""How far the clock of another machine is from this one's. It is asked several times; the quickest answer counts."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from meter_fast.doctor.bounded import end

ROUNDS = 5
SCRIPT = "while read question; do date +%s.%N; done"


@dataclass(frozen=True)
class Clock:
    """Seconds that the other clock is ahead, at least `low` and at most `high`."""

    low: float
    high: float

    @property
    def skew(self) -> float:
        """The least that explains the answers: 0 where the clocks may agree."""
        return self.low if self.low > 0 else min(self.high, 0.0)


class NoAnswer(RuntimeError):
    """The machine could not be asked; the text is what the command said of it."""


async def compare(words: Sequence[str], seconds: float) -> Clock:
    """words: a command that carries out SCRIPT on the other machine. Raises NoAnswer, OSError where there is no such
    command."""
    process = await asyncio.create_subprocess_exec(
        *words, SCRIPT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        return await asyncio.wait_for(_rounds(process), seconds)
    except asyncio.TimeoutError:
        raise NoAnswer(f"no answer within {seconds:g} s") from None
    finally:
        process.stdin.close()
        if process.returncode is None:
            await end(process)


async def _rounds(process: asyncio.subprocess.Process) -> Clock:
    best = None
    for _ in range(ROUNDS):
        asked = time.time()
        with contextlib.suppress(ConnectionError):  # it has ended, and its errors tell why
            process.stdin.write(b"?\n")
            await process.stdin.drain()
        line = (await process.stdout.readline()).decode(errors="replace").strip()
        answered = time.time()
        if not line:
            errors = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
            raise NoAnswer(errors[-1] if errors else "it ended without a word")
        try:
            there = float(line.rstrip("N").rstrip("."))  # a date without %N prints it as it is
        except ValueError:
            raise NoAnswer(f"asked for the time it said {line[:80]!r}; a login script that prints?") from None
        span = 1.0 if "." not in line.rstrip(".N") else 0.0  # whole seconds
        clock = Clock(there - answered, there + span - asked)
        if best is None or clock.high - clock.low < best.high - best.low:
            best = clock
    return best
