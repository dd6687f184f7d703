"""What the stages of rows left behind, and the parts of a page that all comparisons have.

Knows run directories, scores and Markdown. Knows nothing of tables or of how stages are run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meter_fast.ablation.rows import PlannedRow, Stage
from meter_fast.config import RunConfig, from_dict
from meter_fast.training.monitor import RUN_FILE, duration


def status_of(planned: PlannedRow) -> tuple[str, str]:
    """ "done", "failed" or "not run", and of a failure the stage and its message."""
    for stage in planned.stages:
        if stage.failed.is_file():
            return "failed", f"{stage.name}: {_read(stage.failed)['message']}"
    return ("done" if all(stage.done.is_file() for stage in planned.stages) else "not run"), ""


def scores_of(planned: PlannedRow) -> dict[str, dict[str, Any]]:
    """By stage, what its finished evaluations wrote."""
    return {
        stage.name: _read(stage.scores) for stage in planned.stages if stage.config is None and stage.done.is_file()
    }


def facts_of(stage: Stage) -> dict[str, Any]:
    """Command and time of a stage; of training also what the run recorded of itself."""
    facts: dict[str, Any] = {"command": " ".join(("meter-fast", *stage.command))}
    if not stage.done.is_file():
        return facts
    facts["seconds"] = _read(stage.done)["seconds"]
    if stage.config is not None:
        run = _read(stage.run_dir / RUN_FILE)
        config = from_dict(RunConfig, _read(stage.run_dir / "config.json"))
        facts |= {name: run[name] for name in ("steps", "world_size", "zero_stage", "dtype", "device", "versions")}
        facts |= {"seed": config.run.seed, "global_batch": config.engine.global_batch}
    return facts


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def pipe_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: words on the left, figures on the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def runs_text(done: Sequence[dict[str, Any]]) -> str:
    """Steps, seeds, versions and times of what was trained, of rows with a label and the facts of their stages."""
    rows, versions = [], set()
    for row in done:
        for name, stage in row["stages"].items():
            if "steps" in stage:
                rows.append([
                    f"{row['label']}, {name}", f"{stage['steps']:,}", str(stage["global_batch"]), str(stage["seed"]),
                    f"{stage['world_size']} x {stage['device']}", duration(stage["seconds"]),
                ])  # fmt: skip
                versions.add(", ".join(f"{key} {value}" for key, value in stage["versions"].items()))
    if not rows:
        return ""
    table = pipe_table(["run", "steps", "batch", "seed", "processes", "time"], rows)
    return "\n\n".join([table, *sorted(versions), "The commands are in table.json."])
