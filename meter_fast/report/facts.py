"""What a run directory says of its run: recipe, processes, times, curves. Knows file names, no scores and no pages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meter_fast.config import RunConfig, from_dict
from meter_fast.report.plot import Series
from meter_fast.training.monitor import METRICS_FILE, RUN_FILE, read_metrics

CONFIG_FILE, EXPORT_FOLDER = "config.json", "export"


class ReportError(ValueError):
    """A run that cannot be reported on: which file is missing or wrong, and what to do."""


@dataclass(frozen=True)
class RunFacts:
    """A finished (or stopped) run: its directory, resolved recipe, run.json as the trainer wrote it, metrics.jsonl."""

    folder: Path
    config: RunConfig
    run: dict
    metrics: list[dict]

    @property
    def export(self) -> Path:
        return self.folder / EXPORT_FOLDER

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.metrics if "loss" in row]

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.metrics if "evaluation" in row]


def read_run(folder: str | Path) -> RunFacts:
    """Read a run directory. Raises ReportError naming what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: give the run directory (run.dir of the training command)")
    for name in (CONFIG_FILE, RUN_FILE, METRICS_FILE, EXPORT_FOLDER):
        if not (folder / name).exists():
            raise ReportError(
                f"{folder} has no {name}: it is no run directory, or its training has not finished; "
                "run the training command again, it resumes"
            )
    config = from_dict(RunConfig, _read_json(folder / CONFIG_FILE))
    return RunFacts(folder, config, _read_json(folder / RUN_FILE), read_metrics(folder / METRICS_FILE))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): it is damaged; train again") from None
    if not isinstance(content, dict):
        raise ReportError(f"{path} holds no JSON object: it is damaged; train again")
    return content


def curve(rows: Sequence[dict], name: str, *keys: str, tone: int = 1, dots: bool = False) -> Series:
    """The series of rows[...][key][key]... over the step; rows without it give no point."""
    ys = []
    for row in rows:
        value = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        ys.append(value)
    return Series(name, [row["step"] for row in rows], ys, tone, dots)
