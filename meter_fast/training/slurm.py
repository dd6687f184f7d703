"""What `srun` tells the processes that it starts, in the words of torch.

Knows Slurm's variables. Knows nothing of torch or of how processes meet.
"""

import re
from collections.abc import Mapping

# srun alone sets it. The shell of a batch script has SLURM_PROCID and SLURM_NTASKS too, and is no process of a run.
BY_SRUN = "SLURM_STEP_NUM_TASKS"
FIRST_PORT, PORTS = 20000, 10000


def rank(environment: Mapping[str, str]) -> int:
    """Of this process, as its launcher or srun tells; 0 for one that is alone."""
    return int(environment.get("RANK") or (environment["SLURM_PROCID"] if BY_SRUN in environment else "0"))


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a process that srun has started; empty for others,
    and where a launcher has set RANK. MASTER_ADDR and MASTER_PORT stay as they are where they are given; else they
    are the first host of the step and a port that follows from the numbers of job and step."""
    if "RANK" in environment or BY_SRUN not in environment:
        return {}
    number = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment[BY_SRUN],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + number % PORTS),
    }


def first_host(hosts: str) -> str:
    """The first of a list as Slurm writes it: gpu01 of "gpu[01-04,07],login". Raises ValueError for an empty one."""
    found = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", hosts)
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", found.group() if found else "")
    if not name:
        raise ValueError(f"SLURM_STEP_NODELIST={hosts!r} names no host: set MASTER_ADDR to that of the first process")
    return name
