"""Picture files read and checked by several processes, given back in their order.

Knows files and what makes a picture unusable. Knows nothing of tables. What is in memory at a time is bounded: a few
files for each process.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from meter_fast.data.image_check import DEFAULT_MAX_PIXELS, BadImage, check_image
from meter_fast.data.prepare.plan import MISSING, LeftOut, PrepareError, Row

AT_ONCE = 16  # rows that a process reads at a time
LARGEST = 256 << 20  # bytes; a larger file is no picture, and would not leave memory flat

Read = list[bytes | LeftOut]


def read_picture(path: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes | LeftOut:
    """The bytes of a picture file, or why it cannot be used: a cause of image_check, "missing" or "unreadable"."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST:
                return LeftOut(path, "not an image", f"a file of {size:,} bytes")
            content = file.read()
        check_image(content, max_pixels)
        return content
    except FileNotFoundError:
        return LeftOut(path, MISSING)
    except OSError as error:
        return LeftOut(path, "unreadable", str(error.strerror))
    except BadImage as error:
        return LeftOut(path, error.cause, error.detail)


@contextmanager
def picture_reader(
    workers: int = 1, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Iterator[Callable[[Iterator[Row]], Iterator[tuple[Row, Read]]]]:
    """A function from rows to each row with what its pictures are, in order.

    workers: processes; 0 or 1 reads in this one. Raises PrepareError where a reading process ended.
    """
    if workers <= 1:
        yield lambda rows: ((row, _read([row.pictures], max_pixels)[0]) for row in rows)
        return
    with process_pool(workers) as pool:
        yield lambda rows: _read_ahead(pool, workers, rows, max_pixels)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of our own that end with this one. Raises PrepareError where one of them ended before."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_process)
    try:
        yield pool
    except BrokenProcessPool:
        raise PrepareError(
            "a process that reads pictures was ended from outside, perhaps for lack of memory; start again, with "
            "fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    pool: ProcessPoolExecutor, workers: int, rows: Iterator[Row], max_pixels: int
) -> Iterator[tuple[Row, Read]]:
    waiting: deque[tuple[list[Row], Future[list[Read]]]] = deque()
    while True:
        while len(waiting) < workers + 2:
            chunk = list(islice(rows, AT_ONCE))
            if not chunk:
                break
            waiting.append((chunk, pool.submit(_read, [row.pictures for row in chunk], max_pixels)))
        if not waiting:
            return
        chunk, future = waiting.popleft()
        yield from zip(chunk, future.result(), strict=True)


def _read(rows: list[tuple[str, ...]], max_pixels: int) -> list[Read]:
    return [[read_picture(path, max_pixels) for path in paths] for paths in rows]


def _begin_process() -> None:
    """Ctrl-C is the main process's to handle; if that is killed, so that it cannot say so, this one ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
