"""Writes the table of reliability scenarios from the tests that show them: `pytest -p tests.scenario_table`.

A test belongs to a scenario by `@pytest.mark.scenario(8, "what it shows")`. `record_property("figure", "...")` adds a
figure. One row a test function; its cases are counted together. A run of some tests renews their rows; the others
stay, each with its day, unless the test is gone.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.mutations import guards

GUARDS = guards()
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
HEAD = """# What goes wrong, and what happens then

Written by `make test-faults` from the tests that carry out each scenario; do not edit. Faults are real: processes are
killed with SIGKILL in the middle of a pass or of a file, writes fail half way, bytes are flipped. "Fails without" names
what `python -m tests.mutations` takes out of the program to see the test fail. The last run was on {machine}.
"""
COLUMNS = ("#", "shown", "result", "time", "day", "figure", "fails without", "test")
TITLES = {
    1: "Resume, one process", 2: "Resume, two processes, ZeRO 1 and 2, bf16 and fp32, accumulation",
    3: "Asked to save in the middle of an accumulation window", 4: "A process is killed in the middle of a step",
    5: "The job is started again after a crash", 6: "SIGTERM at any step", 7: "SIGINT, SIGHUP, closed terminal",
    8: "Killed while a checkpoint is written", 9: "Full disk", 10: "Read-only, vanished or slow folder",
    11: "Damaged checkpoints", 12: "A checkpoint that cannot be removed", 13: "Another number of processes",
    14: "Another ZeRO stage, accumulation or micro-batch", 15: "Another number of loader threads",
    16: "A global batch that does not divide", 17: "Fewer samples than processes", 18: "Another picture size",
    19: "Odd and broken pictures", 20: "Decompression bombs", 21: "Damaged shards", 22: "Hostile members of archives",
    23: "Odd texts", 24: "No token to predict", 25: "Nothing but bad samples", 26: "Replacement of bad samples",
    27: "A loss that is not finite", 28: "A gradient that is not finite", 29: "Loss spikes and replay of a step",
    30: "Kernels against the reference", 31: "Odd shapes in kernels", 32: "Dropout", 33: "The recorded curve",
    34: "A slow process", 35: "A slow loader", 36: "A process that hangs", 37: "Memory and open files over 2,000 steps",
    38: "Ports and meeting points", 39: "Faults of the GPU or of NCCL", 40: "Files that try to run code",
    41: "Crafted safetensors", 42: "Settings and names as an attack", 43: "Demo server",
    44: "Published checkpoints with objects of Lightning",
}  # fmt: skip


@dataclass
class Row:
    """A test function: its scenario, what it shows, and how its cases ended."""

    number: int
    shows: str
    name: str
    seconds: float = 0.0
    outcomes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """One for each of COLUMNS."""
        passed, ran = self.outcomes.count("passed"), len([o for o in self.outcomes if o != "skipped"])
        result = "skipped" if not ran else "pass" if passed == ran else f"FAIL ({ran - passed} of {ran})"
        cases = f", {ran} cases" if ran > 1 and passed == ran else ""
        return (str(self.number), self.shows, f"{result}{cases}", f"{self.seconds:.0f} s", str(date.today()),
                "; ".join(self.figures), GUARDS.get(self.name, ""), f"`{self.name}`")  # fmt: skip


def kept(page: str) -> dict[tuple[int, str], tuple[str, ...]]:
    """The rows of an earlier page whose tests are still there."""
    rows = {}
    for line in page.splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split(" | "))
        if len(cells) == len(COLUMNS) and cells[0].isdecimal():
            file, _, name = cells[-1].strip("`").partition("::")
            path = PAGE.parents[1] / "tests" / file
            if path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8"):
                rows[int(cells[0]), cells[-1].strip("`")] = cells
    return rows


class Table:
    """Collects the rows."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str], Row] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = (yield).get_result()
        for mark in item.iter_markers("scenario"):
            number, shows = mark.args
            name = f"{item.path.relative_to(PAGE.parents[1] / 'tests')}::{item.originalname}"
            row = self.rows.setdefault((number, name), Row(number, shows, name))
            row.seconds += report.duration
            if report.when == "call" or not report.passed:
                row.outcomes.append(report.outcome)
                row.figures += [str(value) for key, value in report.user_properties if key == "figure"]

    def pytest_sessionfinish(self) -> None:
        if self.rows:
            PAGE.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        before = kept(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
        rows = {**before, **{key: row.cells() for key, row in self.rows.items()}}
        lines = [HEAD.format(machine=machine()), _line(COLUMNS), _line(["---:", *["---"] * (len(COLUMNS) - 1)])]
        numbers = {number for number, _ in rows}
        for number in sorted(numbers):
            lines.append(_line([f"**{number}**", f"**{TITLES[number]}**", *[""] * (len(COLUMNS) - 2)]))
            lines += [_line(cells) for key, cells in sorted(rows.items()) if key[0] == number]
        rest = [f"{number} ({TITLES[number].lower()})" for number in sorted(TITLES.keys() - numbers)]
        lines += ["", f"Without a row here: {', '.join(rest)}."] if rest else []
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    """Processor and versions that the times belong to."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    cores = f"{os.cpu_count()} cores ({platform.machine()}), not idle otherwise"
    return f"{cores}; Python {platform.python_version()}, {packages}"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(), "scenario-table")
