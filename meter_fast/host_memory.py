"""How the C library treats memory that is given back, and how large the pages of its heap are. Knows glibc and Linux;
nothing of models.

By default glibc returns every block above 32 MB to the system at once, and the top of its heap with it. A step on a CPU
allocates such blocks by the hundred, and the system has to clear the same pages each time: 6 % of a plain pre-training
step on an idle machine (2 cores, base, 288 px, 8 pairs in bf16), a third where other programs want the cores, too. What
is kept can lie in pages of 2 MB, which a processor finds faster than 512 small ones: 11 % of a step (`docs/log.md`).

Before 2.38 glibc cuts an aligned block out of a larger one and keeps what is left beside it for small objects, so a
freed block cannot be given to another one of the same size: 8 % of a step's memory. Without the two caches where such
pieces wait they join the block again; that has to be told before a process starts, in its environment (TUNABLES).
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
JOINS_ALIGNED_BLOCKS = (2, 38)  # of glibc
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # mallopt(3)
MADV_HUGEPAGE = 14  # madvise(2)
SPARE = 64 << 20  # bytes at the end of the heap: without them a few small blocks there make the next large one new
ROOM = 7 / 8  # of the machine's memory: the system refuses a block of more than all of it


def splits_aligned_blocks(library: tuple[str, str], environment: Mapping[str, str]) -> bool:
    """Whether a program's freed blocks stay in pieces. library: `platform.libc_ver()`, name and version."""
    name, version = library
    told = all(setting in environment.get("GLIBC_TUNABLES", "") for setting in TUNABLES.split("=", 1)[1].split(":"))
    return name == "glibc" and not told and tuple(map(int, version.split("."))) < JOINS_ALIGNED_BLOCKS


def keep_freed_memory() -> bool:
    """From now on this process keeps memory that it frees, and takes it again, in huge pages where the system allows
    them (transparent huge pages "madvise", the usual setting, or "always"); what it holds never shrinks, and grows for
    some steps until free blocks of every size lie ready. What is free already goes back first. Returns whether the C
    library knows how: glibc does. For programs, not for a library to call: it is of the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        return False
    trim(0)  # what building has left free lies in pieces too small for what steps take
    options = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: SPARE}
    if not all(mallopt(option, value) for option, value in options.items()):
        return False
    _take_huge_pages(library)
    return True


def _take_huge_pages(library: ctypes.CDLL) -> None:
    """Asks for them where the heap is and where it will grow. What grows later would be small pages again, so addresses
    for most of the machine's memory are taken at once; memory follows where they are written to. Where the system
    grants no such room (vm.overcommit_memory=2), the heap as it is has to do."""
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = int(ROOM * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    library.free(library.malloc(ctypes.c_size_t(size)))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    for begin, end in (line.split()[0].split("-") for line in maps if line.endswith("[heap]")):
        length = int(end, 16) - int(begin, 16)
        library.madvise(ctypes.c_void_p(int(begin, 16)), ctypes.c_size_t(length), MADV_HUGEPAGE)
