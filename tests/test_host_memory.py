"""Memory that is freed stays with the process, in a process of its own."""

import subprocess
import sys

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
