"""Hosts that are asked over a stand-in for ssh, which runs what it is given on this machine: the protocol is the real
one. What goes wrong with a host is told by the host's name there."""

import asyncio
import json
import os
import shutil
import subprocess
import sys

import pytest
from asking import asked, stand_ins

from meter_fast.doctor import launcher
from meter_fast.doctor.command import _marker
from meter_fast.doctor.finding import Finding, Report
from meter_fast.doctor.hostfile import read, wrong_line
from meter_fast.doctor.hosts import clock_finding, differences, line_for, look, ssh
from meter_fast.training.ports import free_port


class Ran:
    """One run of the command: exit code, output and what --json has written."""

    def __init__(self, tmp_path, hosts: str, *options: str, env: dict[str, str] | None = None) -> None:
        hostfile, out = tmp_path / "hostfile", tmp_path / "out.json"
        hostfile.write_text(hosts)
        words = [
            sys.executable,
            "-m",
            "meter_fast.cli",
            "doctor",
            "pretrain",
            "size=tiny",
            f"run.dir={tmp_path / 'run'}",
        ]
        words += ["--hostfile", str(hostfile), "--json", str(out), "--port", str(free_port()), *options]
        variables = {**os.environ, **(stand_ins(tmp_path / "stand-in") if env is None else env)}
        done = subprocess.run(words, capture_output=True, text=True, env=variables)
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.json = json.loads(out.read_text()) if out.is_file() else None

    def reached(self, host: str) -> dict[str, dict]:
        """What was found about reaching a host, by name."""
        return {one["name"]: one for one in self.json["hosts"][host]["reached"]}

    def between(self) -> dict[str, dict]:
        return {one["name"]: one for one in self.json["between"]}


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Ran:
    """Hosts of all kinds, asked for what is quick."""
    hosts = ("one", "slow", "denied", "unknown", "talking", "ahead", "dead", "mute", "older")
    text = "# a comment\n\n" + "".join(f"{host} slots=1\n" for host in hosts)
    return Ran(tmp_path_factory.mktemp("several"), text, "--only", "versions")


def test_exit_code_and_verdict(several):
    assert several.code == 1 and several.json["verdict"] == "fails", several.out + several.err
    assert "will fail" in several.out.splitlines()[-1] and list(several.json["hosts"])[:2] == ["one", "slow"]


@pytest.mark.parametrize("host", ["one", "slow", "ahead", "older"])
def test_hosts_that_answer_are_reported(several, host):
    assert several.reached(host)["ssh"]["level"] == "fine"
    names = [one["name"] for one in several.json["hosts"][host]["areas"]["versions"]]
    assert names[:2] == ["meter_fast", "python"]


@pytest.mark.parametrize(
    ("host", "name", "says", "remedy"),
    [
        ("denied", "ssh", "Permission denied", "ssh-copy-id denied"),
        ("unknown", "ssh", "Host key verification failed", "ssh-keyscan -H unknown"),
        ("talking", "ssh", "Welcome!", "ssh talking"),
        ("dead", "doctor", "exit code", "same path on every host"),
        ("mute", "doctor", "cannot be read", "the same meter_fast"),
    ],
)
def test_hosts_that_do_not_answer_are_named_with_the_cause(several, host, name, says, remedy):
    one = several.reached(host)[name]
    assert one["level"] == "fails" and says in one["value"] and remedy in one["remedy"]
    assert several.json["hosts"][host]["areas"] == {}


def test_a_clock_that_is_ahead(several):
    assert several.reached("one")["clock"]["level"] == several.reached("slow")["clock"]["level"] == "fine"
    ahead = several.reached("ahead")["clock"]
    assert ahead["level"] == "fails" and "ahead" in ahead["value"] and "chrony" in ahead["remedy"]


def test_another_version_on_one_host_is_named(several):
    one = several.between()["versions: torch"]
    assert one["level"] == "fails" and "older: 2.1.0" in one["value"] and "one, slow, ahead: " in one["value"]
    assert list(several.between()) == ["versions: torch"]
    assert "older: 2.1.0" in several.out


@pytest.mark.slow
def test_hosts_that_agree_and_meet(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "coco.arrow").write_bytes(bytes(1 << 20))
    ran = Ran(tmp_path, "one slots=1\ntwo slots=1\n", "--only", "gloo,disks", "--data-root", str(data))
    assert ran.code == 0, ran.out + ran.err
    assert ran.between()["gloo"]["level"] == "fine" and "each of 2 hosts" in ran.between()["gloo"]["value"]
    for host in ("one", "two"):
        by_name = {one["name"]: one for one in ran.json["hosts"][host]["areas"]["disks"]}
        assert by_name["shared run directory"]["level"] == by_name["data"]["level"] == "fine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".meter-fast")]


def test_the_marker_is_there_for_a_while_or_not_at_all(tmp_path):
    async def marked(run_dir) -> tuple[str, bool]:
        async with _marker(asked(tmp_path, run_dir=str(run_dir))) as path:
            return path, bool(path) and os.path.exists(path)

    path, there = asyncio.run(marked(tmp_path / "run"))
    assert there and os.path.dirname(path) == str(tmp_path) and not os.path.exists(path)
    (tmp_path / "file").touch()
    assert asyncio.run(marked(tmp_path / "file" / "run")) == ("", False)


def test_programs_that_are_missing_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    by_name = {one.name: one for one in launcher.commands(asked(tmp_path, hosts=2))}
    assert by_name["ssh"].level == by_name["pdsh"].level == "fails" and "apt install pdsh" in by_name["pdsh"].remedy
    assert by_name["deepspeed"].level == "fine"  # beside this Python
    alone = {one.name: one for one in launcher.commands(asked(tmp_path, hosts=1))}
    assert alone["ssh"].level == "fails" and alone["pdsh"].level == "fine"
    (one,) = asyncio.run(look({"node": 1}, asked(tmp_path), {})).reached["node"]
    assert one.name == "ssh" and one.level == "fails"


def test_variables_travel_as_the_launcher_sends_them(tmp_path, monkeypatch):
    for name, value in {**stand_ins(tmp_path / "s"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=nosuch0\nnonsense\n")
    monkeypatch.chdir(tmp_path)
    said = list(launcher.environment(asked(tmp_path)))
    here = {one.name: one for one in said if isinstance(one, Finding)}
    sent = next(one[1] for one in said if isinstance(one, tuple))
    assert here[".deepspeed_env"].level == "fails" and "line 2" in here[".deepspeed_env"].value
    assert "OMP_NUM_THREADS" in here["variables that stay"].value
    report = asyncio.run(look({"one": 1}, asked(tmp_path, areas=("network",)), sent)).reports["one"]
    there = {one.name: one for one in report.findings()}
    assert there["GLOO_SOCKET_IFNAME"].level == "fails" and "nosuch0" in there["GLOO_SOCKET_IFNAME"].value


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh")
@pytest.mark.parametrize(("interval", "level", "says"), [(0, "remark", "does not"), (7, "fine", "after 28 s")])
def test_whether_ssh_notices_that_a_host_is_gone(tmp_path, monkeypatch, interval, level, says):
    monkeypatch.setenv(
        "PDSH_SSH_ARGS_APPEND", f"-F /dev/null -o ServerAliveInterval={interval} -o ServerAliveCountMax=4"
    )
    (one,) = launcher.keep_alive(asked(tmp_path, hosts=2))
    assert one.level == level and says in one.value
    assert not list(launcher.keep_alive(asked(tmp_path, hosts=1)))


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh")
def test_a_host_that_is_not_there(tmp_path):
    cluster = asyncio.run(look({"192.0.2.1": 8}, asked(tmp_path, seconds=5.0), {}))
    (one,) = cluster.reached["192.0.2.1"]
    assert one.name == "ssh" and one.level == "fails" and one.remedy and not cluster.reports


def test_a_host_that_hangs(tmp_path, monkeypatch):
    for name, value in stand_ins(tmp_path / "s").items():
        monkeypatch.setenv(name, value)
    cluster = asyncio.run(look({"hanging": 1}, asked(tmp_path, seconds=3.0), {}))
    (one,) = cluster.reached["hanging"]
    assert one.level == "fails" and one.value == "no answer within 3 s" and "firewall" in one.remedy


def test_a_cluster_of_which_a_host_is_silent_does_not_try_to_meet(tmp_path, monkeypatch):
    for name, value in stand_ins(tmp_path / "s").items():
        monkeypatch.setenv(name, value)
    cluster = asyncio.run(look({"denied": 1, "unknown": 1}, asked(tmp_path, areas=("gloo",)), {}))
    assert cluster.between[-1].level == "unknown" and "denied, unknown" in cluster.between[-1].value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("one\n", "line 1: 'one'"),
        ("one slots=1\ntwo slots=1\none slots=2\n", "line 3: 'one slots=2'"),
        ("# nobody\n", "empty"),
    ],
)
def test_a_hostfile_that_cannot_be_read(tmp_path, text, says):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ValueError, match=r"NAME slots=N") as error:
        read(tmp_path / "hostfile")
    assert says in str(error.value) and str(tmp_path / "hostfile") in str(error.value)


def test_a_bad_line_of_the_hostfile_ends_the_command(tmp_path):
    ran = Ran(tmp_path, "one slots=1\n# fine\ntwo slots=many\n", "--only", "versions")
    assert ran.code == 2 and "line 3: 'two slots=many'" in ran.err and ran.err.count("\n") == 1
    assert ran.json is None and not ran.out


def test_which_line():
    lines = ["a slots=1", "", "aa slots=1", "a slots=2"]
    assert wrong_line(lines, "Hostfile contains multiple entries for a, unable to proceed with launching") == 4
    assert wrong_line(lines, "something else") == 0


@pytest.mark.parametrize(
    ("skew", "level"), [(0.0, "fine"), (0.4, "fine"), (-2.0, "remark"), (2.0, "remark"), (-50.0, "fails")]
)
def test_clocks(skew, level):
    assert clock_finding(skew, 0.01).level == level


def test_differences_are_named_with_their_hosts():
    def report(version: str, cores: str) -> Report:
        return Report({"versions": [Finding("torch", "fine", version, across="fails")],
                       "limits": [Finding("cores", "fine", cores)]})  # fmt: skip

    reports = {"a": report("2.14", "8"), "b": report("2.14", "16"), "c": report("2.6", "8")}
    assert differences(reports) == [
        Finding("versions: torch", "fails", "a, b: 2.14; c: 2.6", "make it the same on all hosts")
    ]
    reports["c"] = Report({"versions": []})
    assert differences(reports)[0].value == "a, b: 2.14; c: nothing"
    assert [one.level for one in differences({"a": reports["a"], "b": reports["b"]})] == ["fine"]


def test_the_command_line_is_quoted_and_ssh_is_told_what_pdsh_is(monkeypatch, tmp_path):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    code = "import os; print(os.getcwd(), os.environ['SENT'])"
    line = line_for([sys.executable, "-c", code], {"SENT": "1; 'rm'"})
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"{tmp_path / 'a b'} 1; 'rm'\n"
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F '/a b/config'")
    assert ssh("node", 3)[:3] == ["ssh", "-F", "/a b/config"] and "BatchMode=yes" in ssh("node", 3)
    assert "ConnectTimeout=3" in ssh("node", 3)[-2] and ssh("node", 3)[-1] == "node"
