"""Memory that is freed stays with the process, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from meter_fast.host_memory import TUNABLES

PROGRAM = """
import resource, torch
from meter_fast.host_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(12)][-1])
"""


def faults(keep: bool) -> int:
    """Pages that the system had to bring for the last of twelve blocks of 256 MB, each freed before the next."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_blocks_are_taken_again() -> None:
    assert faults(keep=False) > 100
    assert faults(keep=True) < 50


BUILT = """
from pathlib import Path
from meter_fast.host_memory import keep_freed_memory
blocks = [bytearray(1 << 16) for _ in range(4000)]
blocks = blocks[::50]
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
assert keep_freed_memory()
print(before - resident())
"""


def test_what_building_left_free_goes_back() -> None:
    """Pages of 256 MB less what is kept of it, which holds the freed pieces between in the heap."""
    done = subprocess.run([sys.executable, "-c", BUILT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000


HUGE = """
import resource, torch
from pathlib import Path
from meter_fast.host_memory import keep_freed_memory
if {limit}:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))
assert keep_freed_memory()
block = torch.ones(1 << 26)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")), int(block[-1]))
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(limit: bool) -> int:
    """Bytes in huge pages of a process that has written 256 MB; limit: and cannot have addresses for much more."""
    done = subprocess.run([sys.executable, "-c", HUGE.format(limit=limit)], capture_output=True, text=True, check=True)
    kilobytes, last = map(int, done.stdout.split())
    assert last == 1
    return 1024 * kilobytes


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system grants no huge pages")
def test_what_is_kept_lies_in_huge_pages() -> None:
    assert huge_pages(limit=False) > 200 << 20


def test_a_system_that_grants_no_room_is_none_the_worse() -> None:
    assert huge_pages(limit=True) < 200 << 20


def test_benchmarks_set_what_the_doctor_recommends() -> None:
    makefile = Path(__file__).parents[1] / "Makefile"
    assert f"HEAP := {TUNABLES}\n" in makefile.read_text()
