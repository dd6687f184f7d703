"""Processes that meet and add up a tensor, over gloo, as the processes of a run do. Also one of these processes itself:
`python -m meter_fast.doctor.gloo RANK WORLD ADDRESS PORT SECONDS`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

from meter_fast.doctor.finding import Asked, Finding, fine
from meter_fast.doctor.network import address
from meter_fast.training.ports import free_port

MET = "all-reduce over gloo: "


def two_processes(asked: Asked) -> Iterator[Finding]:
    """Two processes of this host."""
    port, seconds = free_port(), max(1.0, asked.seconds / 2)
    both = [
        subprocess.Popen(command(rank, 2, "127.0.0.1", port, seconds), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate() for process in both]
    failed = [err for process, (_, err) in zip(both, said) if process.returncode]
    if failed:
        yield Finding("gloo", "fails", f"two processes of this host do not meet: {why(failed[0])}", REMEDY)
    else:
        yield fine("gloo", f"two processes of this host met; {said[0][0].strip()}")


REMEDY = "see the findings on host name and interfaces; GLOO_SOCKET_IFNAME=INTERFACE names the network"


def command(rank: int, world: int, address: str, port: int, seconds: float) -> list[str]:
    """The command line of one of the processes."""
    return [sys.executable, "-m", "meter_fast.doctor.gloo", *map(str, (rank, world, address, port, seconds))]


def why(errors: str) -> str:
    """The line that says what went wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "error" in line]
    return (told or lines or ["it said nothing"])[-1][:300]


def main(argv: list[str]) -> None:
    """Meet the others and add up; raises what torch raises where that does not work within the time."""
    import torch
    import torch.distributed as dist

    rank, world, address, port, seconds = int(argv[0]), int(argv[1]), argv[2], argv[3], float(argv[4])
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    total = torch.full((1024,), float(rank + 1))
    dist.all_reduce(total)
    expected = world * (world + 1) / 2
    assert total.eq(expected).all(), f"the sum is {total[0].item()}, not {expected}"
    print(f"{MET}{world} processes", flush=True)
    dist.destroy_process_group()


PROBES = (address, two_processes)

if __name__ == "__main__":
    main(sys.argv[1:])
