"""Rows of results: what was measured where, when and on which commit, written and read. Knows nothing of what is
measured.

Only rows of one run may be compared: machines have slow spells. There is no column for the run, as none is needed: a
run adds its rows at once, so a file has them together, and it names a variant's metric once. Where the same case, date,
commit, machine and device say one for the second time, the next run begins. What a benchmark writes first of a case has
to be what each of its runs writes.
"""

import csv
import datetime
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "machine", "device", "benchmark", "case", "variant", "metric", "value", "unit")


@dataclass(frozen=True)
class Run:
    """What one run says of one case. values: by variant and metric, in the order of the file; units: by metric."""

    date: str
    commit: str
    machine: str
    device: str
    benchmark: str
    case: str
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(root: Path = RESULTS.parents[1]) -> str:
    """The commit that the working tree stands on, with a plus sign if it has changes beside new results."""
    git = ["git", "-C", str(root)]
    status = ["status", "--porcelain", "--", ".", ":!benchmarks/results"]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, *status], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if dirty.strip() else "")


def append(benchmark: str, rows: list[dict]) -> Path:
    """Adds rows with the keys case, variant, metric, value, unit to the benchmark's CSV file."""
    path = RESULTS / f"{benchmark}.csv"
    path.parent.mkdir(exist_ok=True)
    fresh = not path.exists()
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()}",
        "benchmark": benchmark,
    }
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    return path


def runs(path: Path) -> list[Run]:
    """The runs of a file that `append` has written, oldest first. Raises ValueError for a file of other columns."""
    found: list[Run] = []
    latest: dict[tuple[str, ...], Run] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames}, not {','.join(COLUMNS)}")
        for row in reader:
            key = tuple(row[name] for name in COLUMNS[:6])
            run = latest.get(key)
            if run is None or row["metric"] in run.values.get(row["variant"], {}):
                run = latest[key] = Run(*key)
                found.append(run)
            run.values.setdefault(row["variant"], {})[row["metric"]] = float(row["value"])
            run.units[row["metric"]] = row["unit"]
    return found
