"""Progress line, metrics.jsonl and TensorBoard, written by the real classes and read back."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from full_disk import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from meter_fast.training.monitor import (
    METRICS_FILE,
    RUN_FILE,
    TENSORBOARD_FOLDER,
    Monitor,
    aligned,
    duration,
    keep_steps_up_to,
    read_metrics,
    replace_text,
)


class Clock:
    """Time that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(folder, clock=None, stream=None, is_main=True, total_steps=100, global_batch=64) -> Monitor:
    stream = io.StringIO() if stream is None else stream
    return Monitor(folder, total_steps, global_batch, is_main, stream=stream, clock=clock or Clock())


def record(monitor: Monitor, step: int, **changes) -> None:
    values = {
        "losses": {"mlm": 2.5, "itm": 0.75},
        "metrics": {"mlm": 0.25, "itm": 0.5},
        "lrs": {"base": 1e-3, "heads": 5e-3},
        "grad_norm": 1.5,
        "data_wait_share": 0.125,
        "skipped": {"truncated": 2, "zero bytes": 1},
    }
    monitor.step(step, **{**values, **changes})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8, "8 s"), (59.6, "1 min 00 s"), (250, "4 min 10 s"), (11100, "3 h 05 min"), (187_300, "2 d 04 h")],
)
def test_duration_reads_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_banner_rows_are_aligned():
    lines = aligned([("Run", None), ("device", "cpu"), ("global batch", "4096 = 2 x\n32 x 64"), ("", "more")])
    assert lines[0] == "Run"
    assert {line.index(text) for line, text in zip(lines[1:], ("cpu", "4096", "32 x", "more"))} == {16}


def test_progress_line_has_rate_wait_skips_and_time_left(tmp_path):
    clock, stream = Clock(), io.StringIO()
    monitor = make(tmp_path, clock, stream)
    monitor.start(0)
    clock.now += 20
    record(monitor, 10)
    line = stream.getvalue()
    assert line.endswith("\n") and "\r" not in line
    for part in (
        "step  10/100",
        "mlm 2.500 (25.0 %)",
        "itm 0.750 (50.0 %)",
        "32 samples/s",
        "data wait 12 %",
        "skipped 3",
        "ETA 3 min 00 s",
    ):
        assert part in line
    monitor.close()


def test_rate_and_eta_come_from_recent_steps_of_this_process(tmp_path):
    clock, stream = Clock(), io.StringIO()
    monitor = make(tmp_path, clock, stream, total_steps=1000)
    monitor.start(400)  # resumed: the 400 steps before took no time of this process
    for step in range(410, 660, 10):
        clock.now += 100 if step <= 450 else 5  # slow at first, then 2 steps a second
        record(monitor, step)
    assert monitor.samples_per_second() == pytest.approx(128)
    assert "ETA 2 min 55 s" in stream.getvalue().splitlines()[-1]
    monitor.close()


def test_the_first_interval_counts_only_until_there_is_another(tmp_path):
    clock = Clock()
    monitor = make(tmp_path, clock)
    monitor.start(0)
    clock.now += 64
    record(monitor, 1)
    assert monitor.samples_per_second() == pytest.approx(1)
    for step in (2, 3):
        clock.now += 1
        record(monitor, step)
        assert monitor.samples_per_second() == pytest.approx(64)
    monitor.close()


def test_run_file_holds_the_facts_and_the_time(tmp_path):
    clock = Clock()
    monitor = make(tmp_path, clock)
    monitor.start(0)
    clock.now += 9
    monitor.record_run({"world_size": 2, "dtype": "bf16"})
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"world_size": 2, "dtype": "bf16", "seconds": 9}
    monitor.close()


def test_paused_time_does_not_slow_the_rate(tmp_path):
    clock = Clock()
    monitor = make(tmp_path, clock)
    monitor.start(0)
    clock.now += 10
    with monitor.pause():
        clock.now += 1000
    record(monitor, 10)
    assert monitor.samples_per_second() == pytest.approx(64)
    monitor.close()


def test_on_a_terminal_the_line_is_rewritten_and_messages_stand_below(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    clock, stream = Clock(), Terminal()
    monitor = make(tmp_path, clock, stream)
    monitor.start(0)
    for step in (1, 2):
        clock.now += 1
        record(monitor, step)
    assert stream.getvalue().count("\r") == 2 and "\n" not in stream.getvalue()
    assert all(len(part) <= 59 + len("\x1b[K") for part in stream.getvalue().split("\r"))
    monitor.message("saved")
    assert stream.getvalue().endswith("\nsaved\n")
    monitor.close()


def test_metrics_file_holds_what_was_recorded(tmp_path):
    clock = Clock()
    monitor = make(tmp_path, clock)
    monitor.start(0)
    clock.now += 20
    record(monitor, 10, grad_norm=math.inf)
    monitor.evaluation(10, {"mlm": {"loss": 2.0, "accuracy": 0.5, "count": 7}})
    monitor.close()
    row, held_out = read_metrics(tmp_path / METRICS_FILE)
    assert row["loss"] == {"mlm": 2.5, "itm": 0.75} and row["accuracy"] == {"mlm": 0.25, "itm": 0.5}
    assert row["lr"] == {"base": 1e-3, "heads": 5e-3} and row["skipped"] == {"truncated": 2, "zero bytes": 1}
    assert row["samples_per_second"] == 32 and row["data_wait"] == 0.125 and row["seconds"] == 20
    assert row["grad_norm"] is None  # infinity is no JSON
    assert held_out["evaluation"]["mlm"]["accuracy"] == 0.5 and held_out["step"] == 10


def test_a_resumed_run_leaves_no_step_twice_and_goes_on_with_the_time(tmp_path):
    clock = Clock()
    first = make(tmp_path, clock)
    first.start(0)
    for step in (10, 20, 30):
        clock.now += 7
        record(first, step)
    first.close()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    stream = io.StringIO()
    second = make(tmp_path, clock, stream)
    second.start(20)
    assert "1 lines after step 20 and 1 damaged lines dropped" in stream.getvalue()
    clock.now += 5
    record(second, 30)
    second.close()
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["seconds"] for row in rows] == [7, 14, 19]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_lines_that_stay_are_not_rewritten(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step":  2}\n')
    before = path.stat().st_ino
    assert keep_steps_up_to(path, 2) == (0, 0)
    assert path.stat().st_ino == before and path.read_text() == '{"step": 1}\n{"step":  2}\n'
    assert keep_steps_up_to(path, 1) == (1, 0)
    assert path.read_text() == '{"step": 1}\n'


def test_damaged_metrics_file_is_named_with_its_line(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_tensorboard_gets_scalars_and_the_picture(tmp_path):
    clock = Clock()
    monitor = make(tmp_path, clock)
    monitor.start(0)
    clock.now += 20
    record(monitor, 10)
    monitor.evaluation(10, {"itm": {"loss": 0.5, "accuracy": 0.75}})
    picture = np.full((32, 32, 3), 200, dtype=np.uint8)
    fills = [[("red", 0.7), ("blue", 0.2)], [("star", 0.9), ("square", 0.05)]]
    monitor.picture(10, picture, "a [MASK] [MASK]", ["red", "square"], fills)
    monitor.close()
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER), size_guidance={"images": 0}).Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    expected = {
        "train/loss/mlm": 2.5,
        "train/accuracy/itm": 0.5,
        "train/lr/heads": 5e-3,
        "train/grad_norm": 1.5,
        "run/samples_per_second": 32,
        "run/data_wait": 0.125,
        "run/skipped": 3,
        "held_out/itm/accuracy": 0.75,
    }
    assert {tag: found[tag] for tag in expected} == pytest.approx(expected)
    (image,) = events.Images("held_out/picture")
    assert image.step == 10 and image.width > 400


def test_other_ranks_write_and_print_nothing(tmp_path):
    stream = io.StringIO()
    monitor = make(tmp_path / "run", stream=stream, is_main=False)
    monitor.banner([("device", "cpu")])
    monitor.start(0)
    record(monitor, 1)
    monitor.evaluation(1, {"itm": {"loss": 0.5}})
    monitor.picture(1, np.zeros((4, 4, 3), np.uint8), "a", [], [])
    monitor.summary([("export", "x")], "next")
    monitor.close()
    assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_summary_names_the_time_and_the_next_command(tmp_path):
    clock, stream = Clock(), io.StringIO()
    monitor = make(tmp_path, clock, stream)
    clock.now += 125
    monitor.summary([("export", "runs/x/export")], "meter-fast report runs/x")
    text = stream.getvalue()
    assert "2 min 05 s" in text and text.splitlines()[-1].endswith("meter-fast report runs/x")


def test_a_file_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("before")
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: .*results.csv"):
        replace_text(path, "x" * 5000)
    assert [one.name for one in tmp_path.iterdir()] == ["results.csv"] and path.read_text() == "before"
