"""Rows of results: what was measured where, when and on which commit. Knows nothing of what is measured."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "machine", "device", "benchmark", "case", "variant", "metric", "value", "unit")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that the working tree stands on, with a plus sign if it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
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
