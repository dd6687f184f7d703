"""Two hosts on one machine: network namespaces with an address, a host name and an sshd each. Helpers only, no tests.

    node1 10.231.0.1 ---- eth0 to eth0 ---- node2 10.231.0.2

Each knows itself by its name as 127.0.1.1, as on Debian. Files, processes and the clock are shared. Names of namespaces
hold the process id of the test run: several can be there at once, and what a killed one has left is removed by the
next.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

NAMES, ADDRESSES = ("node1", "node2"), ("10.231.0.1", "10.231.0.2")
PACKAGES = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}
ETC = Path("/etc/netns")  # `ip netns exec NAME` shows the files of ETC/NAME in /etc
PREFIX = "meter-fast"
SSHD = """Port 22
HostKey {0}/hostkey
AuthorizedKeysFile {0}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH = """Host *
  User root
  IdentityFile {0}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ServerAliveInterval 3
  ServerAliveCountMax 3
"""


def missing() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux: network namespaces stand for hosts"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces and to run sshd"
    packages = [package for name, package in PACKAGES.items() if shutil.which(name, path=_path()) is None]
    return f"needs the Debian packages {' '.join(packages)}: apt install {' '.join(packages)}" if packages else ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class TwoHosts:
    """A context manager: inside it `run` and `start` execute commands on host 0 or 1. `folder` holds `hostfile`,
    `ssh_config` and the keys. Raises RuntimeError where the machine refuses."""

    def __init__(self) -> None:
        if text := missing():
            raise RuntimeError(text)
        self.spaces = [f"{PREFIX}-{os.getpid()}-{number}" for number in range(2)]
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-hosts-"))
        self.hostfile = self.folder / "hostfile"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR", "MASTER_PORT")},
            "PATH": f"{Path(sys.executable).parent}:{_path()}",
            "PDSH_SSH_ARGS_APPEND": f"-F {self.folder}/ssh_config",
            "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __enter__(self) -> "TwoHosts":
        for space in leftovers():
            remove(space)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for space in self.spaces:
            remove(space)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> None:
        for name in ("key", "hostkey"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        (self.folder / "sshd_config").write_text(SSHD.format(self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(self.folder))
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd of Debian wants to be
        for space in self.spaces:
            (ETC / space).mkdir(parents=True)
            _do("ip", "netns", "add", space)
        ends = ("eth0", "netns", self.spaces[0]), ("eth0", "netns", self.spaces[1])
        _do("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, (space, address) in enumerate(zip(self.spaces, ADDRESSES)):
            other = 1 - number
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {NAMES[number]}", f"{ADDRESSES[other]} {NAMES[other]}", ""]
            (ETC / space / "hosts").write_text("\n".join(lines))  # as Debian writes it
            _do("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "lo", "up")
            self.link(number, "up")
            sshd = shutil.which("sshd", path=_path())
            self.run(number, [str(sshd), "-f", str(self.folder / "sshd_config")], env={}).check_returncode()

    def link(self, number: int, state: str) -> None:
        """Set a host's end of the link "up" or "down"."""
        _do("ip", "-n", self.spaces[number], "link", "set", "eth0", state)

    def words(self, number: int, command: Sequence[str]) -> list[str]:
        """The command line that executes `command` on a host."""
        rename = f'hostname {NAMES[number]} && exec "$@"'
        return ["ip", "netns", "exec", self.spaces[number], "unshare", "--uts", "sh", "-c", rename, "sh", *command]

    def run(
        self, number: int, command: Sequence[str], seconds: float = 100, env: Mapping[str, str] | None = None, **more
    ) -> subprocess.CompletedProcess:
        """Execute a command on a host to its end. After `seconds` it is killed, and TimeoutExpired raised."""
        env = self.environment if env is None else {"PATH": _path(), **env}
        return subprocess.run(self.words(number, command), text=True, capture_output=True, stdin=subprocess.DEVNULL,
                              timeout=seconds, env=env, **more)  # fmt: skip

    def start(self, number: int, command: Sequence[str], log: Path, **env: str) -> "Started":
        """Start a command on a host in `log.parent`, its output in `log`."""
        with open(log, "ab") as out:
            process = subprocess.Popen(self.words(number, command), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       env={**self.environment, **env}, cwd=log.parent)  # fmt: skip
        return Started(process, log)

    def end_all(self) -> None:
        """Kill what still runs on the hosts, but for their sshd."""
        for space in self.spaces:
            for pid in pids(space):
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if process.name() != "sshd" or process.ppid() != 1:
                        process.kill()


class Started:
    """A command under way."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self._process, self._log, self._began = process, log, time.monotonic()

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._log.read_text(errors="replace")

    def ended(self, seconds: float = 300) -> int:
        """Wait for its end. Returns the exit code; fails with the output after `seconds`, the command killed."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"the command had not ended after {seconds} s:\n{self.said}") from None

    def check(self, code: int = 0, seconds: float = 300) -> str:
        """Fail unless it ends with `code`. Returns its output."""
        ended = self.ended(seconds)
        assert ended == code, f"exit code {ended}\n{self.said}"
        return self.said


def pids(space: str) -> list[int]:
    """Processes on a host."""
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def leftovers() -> list[str]:
    """Namespaces of test runs that are gone."""
    found = re.findall(rf"^({PREFIX}-(\d+)-[01])\b", _do("ip", "netns", "list"), re.MULTILINE)
    return [space for space, pid in found if not psutil.pid_exists(int(pid))]


def remove(space: str) -> None:
    """Take a host down with all that runs on it."""
    deadline = time.monotonic() + 10
    while (left := pids(space)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", space], capture_output=True)
    shutil.rmtree(ETC / space, ignore_errors=True)


def _do(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": _path()})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
