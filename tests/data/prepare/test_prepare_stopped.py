"""A run that is stopped, killed or out of disk leaves no half table and no process; the next one goes on."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raw_sets import MAKERS

from meter_fast.cli import main

COMMAND = [sys.executable, "-m", "meter_fast.cli", "data", "prepare"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def complete(out: Path) -> bool:
    return json.loads((out / "coco.manifest.json").read_text())["complete"]


def hanging_run(raw: Path, out: Path, workers: int) -> subprocess.Popen:
    """A run of COCO that has written a table (val) and now waits, in the middle of the next, for a picture that never
    comes: a pipe that nobody writes to."""
    MAKERS["coco"](raw)
    pipe = raw / "val2014" / "COCO_val2014_000000000005.jpg"  # the second picture of test, the last table
    pipe.rename(pipe.with_name("kept"))
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*COMMAND, "coco", str(raw), str(out), "--workers", str(workers)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a batch job's children ignore it
    )
    deadline = time.monotonic() + 60
    while not (out / ".coco_caption_karpathy_test.arrow.part").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_no_half_table_and_no_process_and_the_next_finishes(tmp_path, workers, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    process = hanging_run(raw, out, workers)
    started = children(process.pid)
    process.kill()
    process.communicate()
    test = out / "coco_caption_karpathy_test.arrow"
    assert not test.exists() and not complete(out)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cwd").exists() for child in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/cwd").exists() for child in started)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    assert len(finished) == 3
    pipe = raw / "val2014" / "COCO_val2014_000000000005.jpg"
    (raw / "val2014" / "kept").replace(pipe)
    assert main(["data", "prepare", "coco", str(raw), str(out), "--workers", "1"]) == 0
    assert "coco_caption_karpathy_train: finished already, 2 rows" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}.items() >= finished.items()
    assert test.exists() and complete(out) and not list(out.glob(".*"))


def test_ctrl_c_ends_with_code_75_and_removes_what_is_half(tmp_path):
    out = tmp_path / "out"
    process = hanging_run(tmp_path / "raw", out, 1)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "the same command goes on" in printed and not list(out.glob(".*"))


def test_a_reading_process_that_is_ended_from_outside_is_an_error(tmp_path):
    out = tmp_path / "out"
    process = hanging_run(tmp_path / "raw", out, 2)
    for child in children(process.pid):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "was ended from outside" in error and error.count("\n") == 1
    assert not list(out.glob(".*"))


def test_a_full_disk_is_an_error_and_leaves_nothing_half(tmp_path):
    MAKERS["nlvr2"](tmp_path / "raw")
    done = subprocess.run(
        [*COMMAND, "nlvr2", str(tmp_path / "raw"), str(tmp_path / "out"), "--workers", "1"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert done.returncode == 2 and "File too large" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json"] == []
