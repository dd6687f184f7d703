"""Nothing that is asked can hold the doctor up, and nothing that was not found out is left out."""

import asyncio
import os
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
from asking import answers, asked, program

from meter_fast.doctor.bounded import Answer, ask
from meter_fast.doctor.finding import AREAS, Finding, Report, amount
from meter_fast.doctor.local import understand
from meter_fast.doctor.page import area_lines, verdict


def gone(pid: int) -> bool:
    """Ended, whether or not someone has taken note of it."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    script = f"sleep 1000 & echo $! > {tmp_path}/child; echo begun; wait"
    answer = asyncio.run(ask(["sh", "-c", script], 5))
    assert answer.code is None and answer.out == "begun\n"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while not gone(child):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_a_child_that_keeps_the_output_open_does_not_hold_up():
    answer = asyncio.run(ask(["sh", "-c", "sleep 1000 & echo done"], 2))
    assert answer.code is None and answer.out == "done\n"


def test_output_codes_and_standard_input():
    answer = asyncio.run(ask(["sh", "-c", "cat; echo wrong >&2; exit 3"], 30, said=b"heard\n"))
    assert answer == Answer(3, "heard\n", "wrong\n") and answer.last_line == "wrong"
    with pytest.raises(OSError):
        asyncio.run(ask(["no-such-program"], 1))


def test_a_probe_that_hangs_is_not_known(tmp_path, monkeypatch):
    program(tmp_path / "bin", "hostname", "#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    by_name = answers(asked(tmp_path, hosts=2, seconds=6.0), "gloo")
    (one,) = by_name.values()
    assert one.level == "unknown" and one.value == "no answer within 6 s"


def test_a_probe_that_raises_is_not_known(tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise ImportError('broken psutil')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (one,) = answers(asked(tmp_path), "limits").values()
    assert one.level == "unknown" and "broken psutil" in one.value
    (data := tmp_path / "data").mkdir()
    (data / "coco.arrow").symlink_to(tmp_path / "nowhere")  # cannot be looked at
    by_name = answers(asked(tmp_path, data_root=str(data)), "disks")
    assert by_name["data root"].level == "unknown" and "FileNotFoundError" in by_name["data root"].value
    assert by_name["run directory"].level in ("fine", "remark")


def test_what_was_found_before_a_probe_hung_stays():
    out = '{"begin": "gpus"}\n{"finding": {"name": "GPUs", "level": "fine", "value": "8"}}\n{"begin": "driver"}\n'
    found = understand("devices", Answer(None, out, ""), 5, {})
    assert found == [Finding("GPUs", "fine", "8"), Finding("driver", "unknown", "no answer within 5 s")]


def test_a_process_that_dies_is_not_known():
    out = '{"begin": "gpus"}\n{"fact": ["address", "10.0.0.1"]}\n{"begin": "driver"}\n{"find'
    facts = {}
    (one,) = understand("devices", Answer(-11, out, "Segmentation fault\n"), 5, facts)
    assert one == Finding("driver", "unknown", "its process ended with code -11: Segmentation fault")
    assert facts == {"address": "10.0.0.1"}


def test_reports_travel_as_json():
    one = Finding("torch", "fails", "2.1", "pip install", "fails")
    report = Report({"versions": [one]}, {"address": "x"})
    assert Report.from_dict(report.to_dict()) == report and report.to_dict()["areas"]["versions"] == [asdict(one)]
    with pytest.raises(TypeError):
        Report.from_dict({"areas": {"versions": [{"nom": "torch"}]}, "facts": {}})


def test_each_area_has_its_module():
    for area in AREAS:
        assert import_module(f"meter_fast.doctor.{area}").PROBES


def test_hosts_side_by_side():
    same, left = Finding("python", "fine", "3.11"), Finding("torch", "fails", "2.1", "pip install torch")
    right = Finding("torch", "fine", "2.14")
    lines = list(area_lines("versions", {"a": [same, left], "b": [same, right]}))
    assert lines[0] == "versions" and lines[1].split() == ["ok", "python", "all", "2", "hosts:", "3.11"]
    assert lines[2].split() == ["FAILS", "torch", "a:", "2.1"] and lines[3].strip() == "-> pip install torch"
    assert lines[4].split() == ["ok", "torch", "b:", "2.14"] and len(lines) == 5


@pytest.mark.parametrize(
    ("levels", "word"),
    [(["fine"], "fine"), (["fine", "unknown"], "remarks"), (["remark"], "remarks"), (["remark", "fails"], "fails")],
)
def test_verdict(levels, word):
    assert verdict([Finding("x", level, "", "do") for level in levels])[0] == word


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 30, "3 GiB"), (5 << 40, "5 TiB"), (1 << 50, "1024 TiB")]
)
def test_amounts(size, text):
    assert amount(size) == text
