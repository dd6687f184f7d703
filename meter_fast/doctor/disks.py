"""Where runs are written and data are read: room, kind of file system, speed of a small sample. Drops no caches, and
leaves nothing behind."""

import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from meter_fast.doctor.finding import Asked, Finding, amount, fine, unknown

MOST, SECONDS = 256 << 20, 2.0  # of a sample
BLOCK = 4 << 20
PICTURE = 128 << 10  # bytes of a picture, about
SLOW_WRITE, SLOW_READ = 50e6, 20e6  # bytes a second
MAPS_BADLY = {
    "9p": "a shared folder of a virtual machine",
    "cifs": "Windows shares",
    "smb3": "Windows shares",
    "vboxsf": "a shared folder of a virtual machine",
    "virtiofs": "a shared folder of a virtual machine",
    "davfs": "WebDAV",
}
OVER_NETWORK = ("nfs", "nfs4", "ceph", "glusterfs")
IN_MEMORY = ("tmpfs", "ramfs")


def existing(path: str) -> Path:
    """The path, or the nearest above it that is there."""
    found = Path(path)
    while not found.exists() and found != found.parent:
        found = found.parent
    return found


def run_directory(asked: Asked) -> Iterator[Finding]:
    """Room, kind and speed of the run directory, or of the folder above it that is there. A small file is written,
    whose name is removed before its content is there."""
    folder = existing(asked.run_dir)
    kind = kind_of(folder, Path("/proc/self/mountinfo").read_text())
    text = f"{asked.run_dir} on {kind}, {amount(shutil.disk_usage(folder).free)} free"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            speed = write_speed(file.fileno())
    except OSError as error:
        yield Finding("run directory", "fails", f"{text}: cannot be written ({error.strerror})", "another run.dir")
        return
    text += f", writes {speed / 1e6:,.0f} MB/s"
    if kind in IN_MEMORY:
        yield Finding("run directory", "remark", f"{text}: in memory, gone after a restart", "another run.dir")
    elif speed < SLOW_WRITE:
        yield Finding("run directory", "remark", text, "a faster disk, or a higher run.save_every")
    else:
        yield fine("run directory", text)


def write_speed(file: int) -> float:
    """Bytes a second, synchronised, of a bounded sample."""
    block, written, began = os.urandom(BLOCK), 0, time.perf_counter()
    while written < MOST and time.perf_counter() - began < SECONDS:
        written += os.write(file, block)
        os.fsync(file)
    return written / (time.perf_counter() - began)


def kind_of(path: Path, mounts: str) -> str:
    """The kind of file system that holds a path. mounts: the text of /proc/self/mountinfo."""
    best, kind = -1, "an unknown file system"
    resolved = path.resolve()
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= best:  # the last one covers those before
            best, kind = len(point.parts), after.split()[0]
    return kind


def shared(asked: Asked) -> Iterator[Finding]:
    """Whether the run directory is the same folder as on the machine that asks: its marker is to be seen here."""
    if not asked.marker:
        return
    if Path(asked.marker).exists():
        yield fine("shared run directory", "as on the machine that asks")
    else:
        text = f"{existing(asked.run_dir)} is not the folder of the machine that asks"
        yield Finding("shared run directory", "fails", text, "a run.dir on a file system that all hosts share")


def data_root(asked: Asked) -> Iterator[Finding]:
    """Files, kind and speed of the data."""
    if not asked.data_root:
        yield unknown("data", "not looked at: give --data-root, or the recipe with data.root=DIR")
        return
    root = Path(asked.data_root)
    if not root.is_dir():
        yield Finding("data", "fails", f"{root} is not there", "data.root=DIR with the .arrow and .tar files; "
                      "it must have the same path on all hosts", "fails")  # fmt: skip
        return
    files = sorted(path for path in root.iterdir() if path.suffix in (".arrow", ".tar"))
    sizes = {path: path.stat().st_size for path in files}
    if not sum(sizes.values()):
        remedy = "meter-fast data prepare or import; data.sources may name shards elsewhere"
        yield Finding("data", "remark", f"{root} has no .arrow or .tar files with content", remedy, "fails")
        return
    listed = hashlib.sha256(repr([(path.name, size) for path, size in sizes.items()]).encode()).hexdigest()[:8]
    yield fine("data", f"{len(files):,} files, {amount(sum(sizes.values()))}, names and sizes {listed}", "fails")
    yield kind_suits(root, kind_of(root, Path("/proc/self/mountinfo").read_text()))
    speed = read_speed([path for path, size in sizes.items() if size])
    text = f"{speed / 1e6:,.0f} MB/s in pieces of {amount(PICTURE)} at random, {speed / PICTURE:,.0f} pictures a second"
    text += " (what is in memory already counts, too)"
    if speed < SLOW_READ:
        yield Finding("reading", "remark", text, "copy the data to a local disk")
    else:
        yield fine("reading", text)


def kind_suits(root: Path, kind: str) -> Finding:
    """Whether tables on that kind of file system map well into memory."""
    if kind in MAPS_BADLY or kind.startswith("fuse"):
        what = MAPS_BADLY.get(kind, "a file system in user space")
        return Finding("data file system", "remark", f"{kind}: {what}; mapped tables are slow or fail there",
                       f"copy {root} to a local disk")  # fmt: skip
    if kind in OVER_NETWORK:
        return Finding("data file system", "remark", f"{kind}: each page of a mapped table comes over the network",
                       f"copy {root} to local disks if reading is slow, or use shards")  # fmt: skip
    return fine("data file system", kind)


def read_speed(files: list[Path]) -> float:
    """Bytes a second of a bounded sample, as training reads: a picture here, a picture there, of all files."""
    draw, read, began = random.Random(0), 0, time.perf_counter()
    while read < MOST and time.perf_counter() - began < SECONDS:
        path = draw.choice(files)
        file = os.open(path, os.O_RDONLY)
        try:
            for _ in range(16):
                start = draw.randrange(max(1, os.fstat(file).st_size - PICTURE))
                read += len(os.pread(file, PICTURE, start))
        finally:
            os.close(file)
    return read / (time.perf_counter() - began)


PROBES = (run_directory, shared, data_root)
