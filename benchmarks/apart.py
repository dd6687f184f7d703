"""Something that is measured, in a process of its own: its peak memory is its own, and nothing of the other side is
resident beside it. Knows processes and pipes; knows nothing of what is measured.

Rounds of several sides alternate by telling one after the other to go, so that a slow spell of the machine meets all.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[], dict[str, float]]


class Apart:
    """A fresh process that makes its work by `make(*arguments)`, and does it whenever it is told to.

    environment: variables that it gets before it makes anything. Raises RuntimeError wherever the process has failed,
    with what it said.
    """

    def __init__(self, make: Callable[..., Work], *arguments: Any, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, environment))
        self._process.start()
        theirs.close()

    def tell(self) -> None:
        """Go, once."""
        self._pipe.send(True)

    def hear(self) -> dict[str, float]:
        """Wait for the end of the work; what it gave."""
        try:
            result = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a measured process has ended with exit code {self._process.exitcode}") from None
        if isinstance(result, str):
            raise RuntimeError(result)
        return result

    def go(self) -> dict[str, float]:
        """Tell and hear."""
        self.tell()
        return self.hear()

    def close(self) -> None:
        """End the process, at once if it is at work."""
        self._pipe.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()


@contextmanager
def closing(sides: Sequence[Apart]) -> Iterator[None]:
    """At the end, whatever it is, no process is left."""
    try:
        yield
    finally:
        for side in sides:
            side.close()


def rounds(groups: Mapping[str, Sequence[Apart]], count: int) -> dict[str, list[dict[str, float]]]:
    """The results of `count` rounds, by group; the processes of a group go together, and their results are joined by
    the largest of each number. One more round, the first, is for what happens once, and does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    for number in range(count + 1):
        for name, group in groups.items():
            for side in group:
                side.tell()
            results = [side.hear() for side in group]
            joined = {key: max(result[key] for result in results) for key in results[0]}
            if number:
                found[name].append(joined)
    return found


def rounds_one_at_a_time(sides: Mapping[str, Callable[[], Apart]], count: int) -> dict[str, list[dict[str, float]]]:
    """The same of sides that do not fit into memory beside each other: each is started for each round, goes once for
    what happens once, goes, and is ended before the next one starts."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(count):
        for name, start in sides.items():
            side = start()
            with closing([side]):
                side.go()
                found[name].append(side.go())
    return found


def _serve(pipe: Connection, make: Callable[..., Work], arguments: Sequence[Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        work = make(*arguments)
        while pipe.recv():
            pipe.send(work())
    except EOFError:  # the other side is gone
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
