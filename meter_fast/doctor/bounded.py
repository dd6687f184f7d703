"""Commands that get a limited time. Knows processes; knows nothing of what they are asked."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GRACE = 2.0  # seconds for what has been killed to go


@dataclass(frozen=True)
class Answer:
    """What a command said. code: None if it had to be killed; `out` is then what it had said until then."""

    code: int | None
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Of the errors, which usually says why."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


async def ask(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None, said: bytes | None = None
) -> Answer:
    """Run a command for `seconds` at most; then it is killed with all that it has started. said: its standard input,
    nothing by default. It is not waited for beyond that: a process that is stuck in the kernel does not end.

    Raises OSError where it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *words, env=env, start_new_session=True, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL if said is None else asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = bytearray(), bytearray()
    parts = [
        asyncio.create_task(_collect(process.stdout, out)),
        asyncio.create_task(_collect(process.stderr, err)),
        asyncio.create_task(process.wait()),
    ]
    try:
        if said is not None:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(said)
                process.stdin.close()
        _, waiting = await asyncio.wait(parts, timeout=seconds)
        if waiting:
            await end(process)
            await asyncio.wait(parts, timeout=GRACE)
    except BaseException:
        await end(process)
        raise
    finally:
        for part in parts:
            part.cancel()
    code = None if waiting else process.returncode
    return Answer(code, out.decode(errors="replace"), err.decode(errors="replace"))


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a process that was started in a session of its own, with what it has started, and give it a moment to go."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), GRACE)


async def _collect(stream: asyncio.StreamReader, into: bytearray) -> None:
    while chunk := await stream.read(1 << 16):
        into += chunk
