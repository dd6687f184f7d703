"""The command itself: exit codes, what is printed and what is written."""

import json
import socket

import pytest
from asking import distribution

from meter_fast.cli import main
from meter_fast.cli_doctor import data_folder
from meter_fast.config import DataConfig
from meter_fast.training.ports import free_port


def doctor(tmp_path, *words: str) -> int:
    """Exit code of the command for a small run."""
    return main(["doctor", "pretrain", "size=tiny", f"run.dir={tmp_path / 'run'}", *words])


def test_only_remarks_end_with_0(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    out = tmp_path / "found.json"
    assert doctor(tmp_path, "--only", "network,limits", "--port", str(free_port()), "--json", str(out)) == 0
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["verdict"] == "remarks" and said.splitlines()[-1] == written["summary"]
    assert list(written["here"]["areas"]) == ["network", "limits"] and "is free" in said
    found = {one["name"]: one for one in written["here"]["areas"]["limits"]}
    assert found["OMP_NUM_THREADS"]["level"] == "remark" and f"-> {found['OMP_NUM_THREADS']['remedy']}" in said


def test_what_will_fail_ends_with_1(tmp_path, capsys, monkeypatch):
    distribution(tmp_path / "site", "torch", "2.1.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert doctor(tmp_path, "--only", "versions") == 1
    said = capsys.readouterr().out
    assert "FAILS     torch" in said and "-> pip install 'torch>=2.6'" in said and "1 will fail" in said


def test_a_taken_port_ends_with_1(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert doctor(tmp_path, "--only", "network", "--port", str(taken.getsockname()[1])) == 1
    assert "FAILS     master port" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "versions,nothing"], "--only nothing: some of versions, devices"),
        (["--seconds", "0"], "--seconds 0"),
        (["--port", "70000"], "--port 70000"),
        (["--json", "/nowhere/found.json"], "there is no folder /nowhere"),
        (["--hostfile", "/nowhere/hostfile"], "there is no such file"),
        (["run.dri=x"], "did you mean run.dir"),
    ],
)
def test_wrong_words_end_with_2(tmp_path, capsys, words, says):
    assert doctor(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("meter-fast doctor: ") and error.count("\n") == 1


def test_where_data_are_looked_for():
    assert data_folder(DataConfig(root="here", sources=("coco",))) == "here"
    assert data_folder(DataConfig(root="here", sources=("shards:part",))) == "here"
    assert data_folder(DataConfig(root="here", sources=("shards:/data/cc/{0..9}.tar",))) == "/data/cc"
