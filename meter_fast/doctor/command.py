"""Carries `meter-fast doctor` out: asks this machine, or the hosts of a hostfile, shows and writes what was found."""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

from meter_fast.doctor import hosts, local, marker
from meter_fast.doctor.bounded import ask, end
from meter_fast.doctor.finding import Asked, Finding, Report, unknown
from meter_fast.doctor.page import area_lines, verdict

LAUNCHER = "launcher"  # the area of the machine that starts the hosts

Say = Callable[[str], None]


async def examine(asked: Asked, hostfile: Path | None, say: Say) -> dict:
    """Everything found, as a JSON value with the key "verdict": "fails", "remarks" or "fine". Raises ValueError for a
    hostfile that cannot be read."""
    if hostfile is None:
        here = await local.look(asked)
        for area in asked.areas:
            _show(say, area, {"": here.areas[area]})
        return _conclude(say, [*here.findings()], {"here": here.to_dict()})
    slots = await read_hostfile(hostfile, asked.seconds)
    here = await local.look(replace(asked, hosts=len(slots), areas=(LAUNCHER,)))
    async with _marker(asked) as mark:
        cluster = await hosts.look(slots, replace(asked, marker=mark), here.facts.pop("environment", {}))
    if not mark:
        cluster.between.append(unknown("shared run directory", f"{asked.run_dir}: this machine cannot write there"))
    _show(say, LAUNCHER, {"": here.areas[LAUNCHER]})
    _show(say, "hosts", cluster.reached)
    for area in asked.areas:
        if cluster.reports:
            _show(say, area, {host: report.areas.get(area, []) for host, report in cluster.reports.items()})
    _show(say, "between hosts", {"": cluster.between})
    found = [*here.findings(), *cluster.between, *(one for each in cluster.reached.values() for one in each)]
    found += [one for report in cluster.reports.values() for one in report.findings()]
    return _conclude(say, found, {
        "here": here.to_dict(),
        "hosts": {host: {"slots": slots[host], "reached": [asdict(one) for one in cluster.reached[host]],
                         **cluster.reports.get(host, Report()).to_dict()} for host in slots},
        "between": [asdict(one) for one in cluster.between],
    })  # fmt: skip


def _show(say: Say, area: str, by_host: dict[str, list[Finding]]) -> None:
    for line in area_lines(area, by_host):
        say(line)


def _conclude(say: Say, found: list[Finding], report: dict) -> dict:
    word, line = verdict(found)
    say(line)
    return {"verdict": word, "summary": line, **report}


async def read_hostfile(path: Path, seconds: float) -> dict[str, int]:
    """Slots of each host, as DeepSpeed reads the file. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"--hostfile {path}: there is no such file; a host is a line NAME slots=N")
    answer = await ask([sys.executable, "-m", "meter_fast.doctor.hostfile", str(path)], seconds)
    lines = answer.out.strip().splitlines()
    if answer.code not in (0, 2) or not lines:
        why = answer.last_line or f"no answer within {seconds:g} s"
        raise ValueError(f"--hostfile {path}: DeepSpeed, which reads it, cannot be asked: {why}")
    said = json.loads(lines[-1])
    if "error" in said:
        raise ValueError(f"--hostfile {said['error']}")
    return said["hosts"]


@asynccontextmanager
async def _marker(asked: Asked):
    """Path of a file that is there inside it, in the run directory or the folder above it; "" where none can be
    written. A process of its own keeps it, as the folder may not answer."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meter_fast.doctor.marker", asked.run_dir, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        try:
            line = await asyncio.wait_for(process.stdout.readline(), asked.seconds)
        except asyncio.TimeoutError:
            line = b""
        yield line.decode().strip()
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), marker.SECONDS)
        except asyncio.TimeoutError:
            await end(process)
