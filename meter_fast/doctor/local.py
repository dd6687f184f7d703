"""Looks at this host, several areas at once: `python -m meter_fast.doctor.local --json FILE ASKED`, as hosts are asked.

Knows areas by name and how to read what their processes say.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meter_fast.doctor.bounded import Answer, ask
from meter_fast.doctor.finding import Asked, Finding, Report, unknown

AT_ONCE = 4


async def look(asked: Asked) -> Report:
    """The report of this host on what is asked."""
    report = Report()
    gate = asyncio.Semaphore(max(1, min(AT_ONCE, len(os.sched_getaffinity(0)))))

    async def one(name: str) -> Answer:
        async with gate:
            return await ask([sys.executable, "-m", "meter_fast.doctor.area", name, asked.to_json()], asked.seconds)

    answers = await asyncio.gather(*map(one, asked.areas))
    for name, answer in zip(asked.areas, answers, strict=True):
        report.areas[name] = understand(name, answer, asked.seconds, report.facts)
    return report


def understand(area: str, answer: Answer, seconds: float, facts: dict[str, object]) -> list[Finding]:
    """The findings of an area's process; facts are added to `facts`. What it had begun when it was killed, or when it
    ended by itself before its end, is a finding."""
    found, begun, ended = [], area, False
    for line in answer.out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # cut off
            continue
        begun, ended = said.get("begin", begun), ended or "end" in said
        if "finding" in said:
            found.append(Finding(**said["finding"]))
        if "fact" in said:
            facts[said["fact"][0]] = said["fact"][1]
    if answer.code is None:
        found.append(unknown(begun, f"no answer within {seconds:g} s"))
    elif not ended:
        found.append(unknown(begun, f"its process ended with code {answer.code}: {answer.last_line or 'no message'}"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report as JSON to a file, or with "-" to standard output."""
    parser = argparse.ArgumentParser(prog="meter_fast.doctor.local")
    parser.add_argument("--json", metavar="FILE", required=True)
    parser.add_argument("asked", metavar="ASKED")
    arguments = parser.parse_args(argv)
    report = asyncio.run(look(Asked.from_json(arguments.asked)))
    text = json.dumps(report.to_dict())
    if arguments.json == "-":
        print(text, flush=True)
    else:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
