"""How the C library treats memory that is given back. Knows glibc; nothing of models.

By default glibc returns every block above 32 MB to the system at once, and the top of its heap with it. A step on a CPU
allocates such blocks by the hundred, and the system has to clear the same pages each time: 6 % of a plain pre-training
step on an idle machine (2 cores, base, 288 px, 8 pairs in bf16), a third where other programs want the cores, too
(`docs/log.md`).
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # mallopt(3)
SPARE = 64 << 20  # bytes at the end of the heap: without them a few small blocks there make the next large one new


def keep_freed_memory() -> bool:
    """From now on this process keeps memory that it frees, and takes it again; what it holds never shrinks, and grows
    for some steps until free blocks of every size lie ready. What is free already goes back first. Returns
    whether the C library knows how: glibc does. For programs, not for a library to call: it is of the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        return False
    trim(0)  # what building has left free lies in pieces too small for what steps take
    options = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: SPARE}
    return all(mallopt(option, value) for option, value in options.items())
