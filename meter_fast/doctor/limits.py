"""What this host lets processes have: shared memory, open files, memory, cores. Looks at limits and control groups."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from meter_fast.doctor.finding import Asked, Finding, amount, fine
from meter_fast.host_memory import TUNABLES, splits_aligned_blocks
from meter_fast.recipes import resolve

MIB, GIB = 1 << 20, 1 << 30
NCCL_SHARED = 32 * MIB  # for each process: NCCL's buffers between the GPUs of a host
OWN_FILES = 256  # libraries, sockets to other processes, pipes
CGROUP = Path("/sys/fs/cgroup")


def shared_memory(asked: Asked) -> Iterator[Finding]:
    """/dev/shm. Loader workers are threads and take none of it; NCCL does, between the GPUs of a host."""
    usage = shutil.disk_usage("/dev/shm")
    yield shared_memory_suffices(usage.total, usage.free, asked.processes, asked.slots > 1 or bool(_gpu_files()))


def _gpu_files() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))


def shared_memory_suffices(total: int, free: int, processes: int, gpus: bool) -> Finding:
    """Bytes of /dev/shm for so many processes of a host."""
    text = f"{amount(free)} free of {amount(total)}; loader workers are threads and take none"
    remedy = "in a container start it with --shm-size=8g (or --ipc=host); else mount -o remount,size=8g /dev/shm"
    if gpus and processes > 1 and free < processes * NCCL_SHARED:
        return Finding("shared memory", "fails", f"{text}; NCCL takes about {amount(processes * NCCL_SHARED)}", remedy)
    if gpus and processes > 1 and free < GIB:
        return Finding("shared memory", "remark", text, remedy)
    return fine("shared memory", text)


def open_files(asked: Asked) -> Iterator[Finding]:
    """ulimit -n against the tables and shards that a process keeps open, and its threads."""
    from meter_fast.data.shards import OPEN_SHARDS

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tables = shards = 0
    if asked.data_root and os.path.isdir(asked.data_root):
        with os.scandir(asked.data_root) as entries:
            names = [entry.name for entry in entries]
        tables, shards = (sum(name.endswith(end) for name in names) for end in (".arrow", ".tar"))
    workers = resolve(asked.command).data.workers
    need = OWN_FILES + tables + min(shards, OPEN_SHARDS) + workers + (asked.world or asked.processes)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    text = f"{shown}; a process needs about {need:,} ({tables:,} tables, {shards:,} shards, {OPEN_SHARDS} open at most)"
    allowed = f"up to {hard:,} without asking" if hard > soft else "and in /etc/security/limits.conf"
    remedy = f"ulimit -n {max(4096, 2 * need)} ({allowed})"
    if soft != resource.RLIM_INFINITY and soft < need:
        yield Finding("open files", "fails", text, remedy)
    elif soft != resource.RLIM_INFINITY and soft < 1024:
        yield Finding("open files", "remark", text, remedy)
    else:
        yield fine("open files", text)


def other_limits(asked: Asked) -> Iterator[Finding]:
    """Of address space, threads and locked memory, where there are any that matter."""
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        text = f"{amount(space)}: tables are mapped, and CUDA reserves more than a GPU has"
        yield Finding("address space", "fails" if _gpu_files() else "remark", text, "ulimit -v unlimited")
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    need = asked.processes * (64 + 2 * len(os.sched_getaffinity(0)))
    if threads != resource.RLIM_INFINITY and threads < need:
        yield Finding("threads", "remark", f"{threads:,} for this user, about {need:,} are wanted", "ulimit -u 65536")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield Finding(
            "locked memory", "remark", f"{amount(locked)}: InfiniBand registers buffers", "ulimit -l unlimited"
        )


def memory(asked: Asked) -> Iterator[Finding]:
    """Of the host and of the control group: a process above the latter is killed without a word."""
    seen = psutil.virtual_memory()
    yield fine("memory", f"{amount(seen.available)} free of {amount(seen.total)}")
    limit = least_limit(CGROUP, Path("/proc/self/cgroup").read_text(), ("memory.max", "memory.limit_in_bytes"))
    if limit is not None and limit < seen.total:
        yield Finding("memory of the control group", "remark", f"{amount(limit)} of {amount(seen.total)}: beyond it "
                      "processes are killed", "a higher limit of the container or job (--memory, --mem)")  # fmt: skip


def least_limit(root: Path, memberships: str, names: tuple[str, ...]) -> int | None:
    """The lowest limit that holds for a process, from its own group up; None for no limit.

    memberships: the text of /proc/self/cgroup ("0::/a/b", "4:memory:/a"); names: of the file, of version 2 and 1."""
    found = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        base = root / controllers if controllers else root
        for folder in (Path(path), *Path(path).parents):
            for name in names:
                try:
                    text = (base / str(folder).lstrip("/") / name).read_text().split()[0]
                except (OSError, IndexError):
                    continue
                if text.isdigit() and int(text) < 1 << 60:  # version 1 writes a huge number for none
                    found.append(int(text))
    return min(found, default=None)


def cores(asked: Asked) -> Iterator[Finding]:
    """For each process, against its loader workers and the threads of its operators."""
    allowed, installed = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cpu_quota(CGROUP, Path("/proc/self/cgroup").read_text())
    count = min(allowed, quota) if quota else allowed
    workers = resolve(asked.command).data.workers
    limit = f", {quota:g} by the control group's quota" if quota and quota < allowed else ""
    text = f"{allowed} of {installed}{limit}: {count / asked.processes:.3g} for each of {asked.processes} processes, "
    text += f"{workers} loader workers each"
    if count / asked.processes < 1:
        yield Finding("cores", "remark", text, "fewer processes, or more cores for the job (--cpus-per-task, --cpus)")
    elif count / asked.processes < workers:
        yield Finding("cores", "remark", text, f"data.workers={max(1, int(count / asked.processes))}, or more cores")
    else:
        yield fine("cores", text)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if asked.processes > 1 and not threads and not _gpu_files():
        each = max(1, int(count / asked.processes))
        yield Finding("OMP_NUM_THREADS", "remark", f"not set: each of {asked.processes} processes takes all cores, and "
                      "they wait for each other", f"export OMP_NUM_THREADS={each}")  # fmt: skip
    elif threads.isdigit() and int(threads) * asked.processes > count:
        each = max(1, int(count / asked.processes))
        yield Finding("OMP_NUM_THREADS", "remark", f"{threads} x {asked.processes} processes, {count:g} cores",
                      f"export OMP_NUM_THREADS={each}")  # fmt: skip


def heap(asked: Asked) -> Iterator[Finding]:
    """What a step on a CPU loses to pieces of freed memory."""
    library = platform.libc_ver()
    text = " ".join(library).strip() or "unknown C library"
    if not _gpu_files() and splits_aligned_blocks(library, os.environ):
        text += ": freed blocks stay in pieces, 8 % of the memory of a training step"
        yield Finding("heap", "remark", text, f"export {TUNABLES}")
    else:
        yield fine("heap", text)


def cpu_quota(root: Path, memberships: str) -> float | None:
    """Cores that the control groups of a process allow at a time; None for no limit."""
    found = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        for folder in (Path(path), *Path(path).parents):
            at = root / controllers / str(folder).lstrip("/")
            try:
                if (at / "cpu.max").is_file():
                    quota, period = (at / "cpu.max").read_text().split()
                else:
                    quota, period = ((at / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            except OSError:
                continue
            if quota.lstrip("-").isdigit() and int(quota) > 0:
                found.append(int(quota) / int(period))
    return min(found, default=None)


PROBES = (shared_memory, open_files, other_limits, memory, cores, heap)
