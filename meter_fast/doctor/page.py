"""Findings as lines of text, hosts side by side. Knows nothing of how anything was found."""

import textwrap
from collections.abc import Iterator, Mapping

from meter_fast.doctor.finding import Finding

MARKS = {"fine": "ok", "remark": "remark", "fails": "FAILS", "unknown": "not known"}
WIDTH = 120


def area_lines(area: str, by_host: Mapping[str, list[Finding]]) -> Iterator[str]:
    """An area of one host (whose name may be "") or of several: findings that all hosts share are one line."""
    yield area
    names = dict.fromkeys(one.name for found in by_host.values() for one in found)
    for name in names:
        said = {host: [one for one in found if one.name == name] for host, found in by_host.items()}
        if len(by_host) > 1 and all(found == next(iter(said.values())) for found in said.values()):
            said = {f"all {len(by_host)} hosts": next(iter(said.values()))}
        for host, found in said.items():
            for one in found:
                yield from _lines(one, host)


def _lines(one: Finding, host: str) -> Iterator[str]:
    where = f"{host}: " if host else ""
    label = f"  {MARKS[one.level]:<10}{one.name:<22} "
    yield from textwrap.wrap(
        where + " ".join(one.value.split()), WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_long_words=False, break_on_hyphens=False,
    ) or [label]  # fmt: skip
    if one.remedy:
        yield from textwrap.wrap(one.remedy, WIDTH, initial_indent=" " * 12 + "-> ", subsequent_indent=" " * 15,
                                 break_long_words=False, break_on_hyphens=False)  # fmt: skip


def verdict(findings: list[Finding]) -> tuple[str, str]:
    """("fails", "remarks" or "fine", and a line that says so)."""
    counts = {level: sum(one.level == level for one in findings) for level in MARKS}
    rest = f"{counts['remark']} remarks, {counts['unknown']} not known, {counts['fine']} fine"
    if counts["fails"]:
        return "fails", f"{counts['fails']} will fail; {rest}"
    if counts["remark"] or counts["unknown"]:
        return "remarks", f"nothing found that will fail; {rest}"
    return "fine", f"all {counts['fine']} fine"
