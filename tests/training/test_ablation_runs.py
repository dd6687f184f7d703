"""Small rows through the real trainer: interrupted, resumed in another number of processes, read; one that fails."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from ranks import stop, wait_until
from small_run import losses, settings

from meter_fast.ablation.plan import make_plan
from meter_fast.ablation.table import collect, markdown, write_table
from meter_fast.training import checkpoint

pytestmark = pytest.mark.slow


def argv(data: Path, run: Path, *more: str) -> list[str]:
    """Of the table of objectives, at the size of small_run."""
    common = [text for text in settings(data, "engine.dtype=fp32", "engine.micro_batch=2") if "val_sources" not in text]
    own = ["pretrain:data.val_sources=", f"run.dir={run}", "pictures=6"]
    return ["table=objectives", "size=tiny", *common, *own, *more]


def start(log: Path, *words: str) -> subprocess.Popen:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(log, "a") as out:
        command = [sys.executable, "-m", "meter_fast.cli", "train", "ablation", *words]
        return subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)


def test_interrupted_and_gone_on_with(scenes, tmp_path):
    run, log = tmp_path / "table", tmp_path / "log"
    row, words = run / "rows" / "mlm_itm", ["rows=mlm_itm", "vqa:run.max_steps=2"]
    first = start(log, *argv(scenes, run, "processes=2", "pretrain:run.max_steps=100000", *words))
    metrics = row / "pretrain" / "metrics.jsonl"
    wait_until(lambda: first.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), 180)
    family = psutil.Process(first.pid).children(recursive=True)
    assert len(family) >= 3, log.read_text()
    stop(first.pid, signal.SIGTERM)
    assert first.wait(90) == 75, log.read_text()
    assert not psutil.wait_procs(family, timeout=5)[1]  # the command is the last to go
    [step] = checkpoint.steps(row / "pretrain" / "checkpoints")
    assert step >= 2 and not list(run.glob("rows/*/*.done.json")) and not (run / "table.json").exists()
    assert "the same command goes on from here" in log.read_text()

    words = argv(scenes, run, "processes=1", f"pretrain:run.max_steps={step + 3}", *words)
    assert start(log, *words).wait(300) == 0, log.read_text()
    said = log.read_text()
    assert f"starts from   {row}/pretrain/checkpoints/step-{step:08d}" in (row / "pretrain.log").read_text()
    assert "[1/1 mlm_itm, retrieval] pictures 6/6" in said and "1 of 1 rows done" in said
    assert sorted(losses(row / "pretrain")) == list(range(1, step + 4))

    result = json.loads((run / "table.json").read_text())
    (found,) = result["rows"]
    recalls = json.loads((row / "retrieval.json").read_text())
    answers = json.loads((row / "vqa_score.json").read_text())
    assert found["status"] == "done" and found["ours"] == {
        "VQAv2": 100 * answers["vqa"]["all"]["score"],
        "IR@1": 100 * recalls["retrieval"]["ir_r1"],
        "TR@1": 100 * recalls["retrieval"]["tr_r1"],
    }
    assert found["chance"]["IR@1"] == pytest.approx(100 / 6) and recalls["pictures"] == 6
    pretrain, vqa = found["stages"]["pretrain"], found["stages"]["vqa"]
    assert (pretrain["steps"], pretrain["seed"], pretrain["world_size"]) == (step + 3, 0, 1) and vqa["steps"] == 2
    assert "torch" in vqa["versions"] and vqa["seconds"] > 0 and pretrain["global_batch"] == 8
    text = (run / "table.md").read_text()
    assert "| MLM + ITM | 74.98† |" in text and "| 66.08 |" in text and "without having been re-read" in text
    assert f"| MLM + ITM, pretrain | {step + 3} | 8 | 0 | 1 x CPU |" in text and "with other pictures" in text
    with Image.open(run / "table.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 20

    files = {path: path.stat().st_mtime_ns for path in run.glob("rows/*/*/run.json")}
    assert start(log, *words).wait(60) == 0, log.read_text()
    assert log.read_text().count("done already") == 4 and len(files) == 2
    assert files == {path: path.stat().st_mtime_ns for path in run.glob("rows/*/*/run.json")}
    assert start(log, *words, "optim.clip=0.5").wait(60) == 2
    assert "was done with other settings" in log.read_text() and "optim.clip=0.5" in log.read_text()


def test_a_row_that_fails_is_shown_and_the_others_go_on(data, tmp_path):
    run, log = tmp_path / "table", tmp_path / "log"
    blocked = run / "rows" / "itm" / "pretrain"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run directory should be")
    words = argv(data, run, "rows=itm,mlm_itm", "stages=retrieval", "processes=1", "pretrain:run.max_steps=2")
    assert start(log, *words).wait(200) == 1, log.read_text()
    said = log.read_text()
    assert "1 of 2 rows done" in said and "failed: itm; the same command tries them again" in said
    itm, both = json.loads((run / "table.json").read_text())["rows"]
    assert (itm["status"], itm["ours"], both["status"]) == ("failed", {}, "done")
    assert set(both["ours"]) == {"IR@1", "TR@1"}
    assert itm["message"].startswith("pretrain: error:") and "itm/pretrain" in itm["message"]
    text = (run / "table.md").read_text()
    assert "| ITM (failed) | 72.63† | 53.74 | - |" in text and "**ITM** failed in pretrain: error:" in text
    blocked.unlink()
    assert start(log, *words).wait(200) == 0, log.read_text()
    assert [row["status"] for row in json.loads((run / "table.json").read_text())["rows"]] == ["done", "done"]


def test_a_table_before_anything_was_run(data, tmp_path):
    plan = make_plan(argv(data, tmp_path / "table", "rows=itm,mlm_itm", "stages=retrieval"))
    plan.folder.mkdir()
    result = write_table(plan)
    assert [row["status"] for row in result["rows"]] == ["not run", "not run"] and result == collect(plan)
    assert "| ITM (not run) | 72.63† | 53.74 | 71.00 |" in markdown(result)
    assert (plan.folder / "table.png").stat().st_size > 1000
