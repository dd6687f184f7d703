"""Fine-tuning from a pre-trained model and from scratch, through the real trainer; the table that comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_run import settings

pytestmark = pytest.mark.slow


def transfer(log: Path, *words: str) -> int:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(log, "a") as out:
        command = [sys.executable, "-m", "meter_fast.cli", "train", "transfer", *words]
        return subprocess.run(command, stdout=out, stderr=out, env=env).returncode


def test_the_table_of_two_tasks(ranks, scenes, tmp_path):
    common = [text for text in settings(scenes, "engine.dtype=fp32") if "val_sources" not in text]
    ranks.train(1, tmp_path / "pretrained", [*common, "run.max_steps=2"]).check()
    run, log = tmp_path / "tasks", tmp_path / "log"
    words = [
        "size=tiny", f"init={tmp_path / 'pretrained'}", f"run.dir={run}", *common, "run.max_steps=2", "pictures=6",
        "processes=1", "tasks=nlvr2,retrieval", "seeds=4",
    ]  # fmt: skip
    assert transfer(log, *words, "starts=pretrained,zero_shot") == 0, log.read_text()
    assert transfer(log, *words, "starts=pretrained,scratch,zero_shot", "retrieval:run.max_steps=3") == 2
    assert "was done with other settings" in log.read_text()
    done = {path: path.stat().st_mtime_ns for path in run.glob("rows/*/*.done.json")}
    assert len(done) == 5
    assert transfer(log, *words, "tasks=nlvr2") == 0, log.read_text()
    assert done == {path: path.stat().st_mtime_ns for path in done}

    result = json.loads((run / "table.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == {"nlvr2-pretrained-4", "nlvr2-scratch-4"}
    for name, row in rows.items():
        found = json.loads((run / "rows" / name / "score.json").read_text())["nlvr2"]["all"]
        figure = row["figures"]["NLVR2 accuracy"]
        assert figure == {key: 100 * found[key] for key in ("chance", "exchanged")} | {"value": 100 * found["accuracy"]}
        assert (row["stages"]["train"]["steps"], row["stages"]["train"]["seed"]) == (2, 4)
    summary = result["summary"]["NLVR2 accuracy"]
    assert summary["starts"]["scratch"]["mean"] == rows["nlvr2-scratch-4"]["figures"]["NLVR2 accuracy"]["value"]
    text = (run / "table.md").read_text()
    assert "| NLVR2 accuracy | 50.0 | - |" in text and "nlvr2, from scratch, seed 4" in text
    with Image.open(run / "table.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 20
