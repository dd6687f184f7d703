"""Starts real processes for tests and says how each ended. Helpers only, no tests."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Ended:
    """How a run ended: exit code (minus the signal that killed it), seconds since the start and output of each rank."""

    codes: list[int]
    seconds: list[float]
    logs: list[str]
    pids: list[int] = field(default_factory=list)

    def check(self, code: int = 0) -> "Ended":
        """Fail with the output unless every rank ended with `code`."""
        assert self.codes == [code] * len(self.codes), f"exit codes {self.codes}\n" + "\n".join(self.logs)
        return self


class RankServer:
    """Client of rank_server.py; one run at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._said: queue.Queue[dict] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._said.get(timeout=120) == {"ready": True}

    def run(
        self,
        world: int,
        log: Path,
        target: str,
        timeout: float = 240,
        meanwhile: Callable[[list[int]], None] | None = None,
        env: dict[str, str] | None = None,
        **arguments,
    ) -> Ended:
        """target(**arguments) on `world` ranks. `meanwhile` gets the process ids while they run. After `timeout`
        seconds the rest is killed, and shows as exit code -9."""
        log.mkdir(parents=True, exist_ok=True)
        request = {"world": world, "log": str(log), "target": target, "arguments": arguments, "env": env or {}}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pids = self._said.get(timeout=30)["pids"]
        ended = Ended([99] * world, [0.0] * world, [""] * world, pids)
        try:
            if meanwhile is not None:
                meanwhile(pids)
        except BaseException:  # the test fails, and must not leave ranks behind for which the next one would wait
            for pid in pids:
                stop(pid, signal.SIGKILL)
            self._wait(ended, pids, 0)
            raise
        self._wait(ended, pids, timeout)
        ended.logs = [(log / f"rank-{rank}.log").read_text(errors="replace") for rank in range(world)]
        return ended

    def _wait(self, ended: Ended, pids: list[int], timeout: float) -> None:
        """Take down how each rank ends; kill what is left after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self._said.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                for pid in pids:
                    stop(pid, signal.SIGKILL)
                deadline = time.monotonic() + 30
                continue
            if "done" in message:
                return
            ended.codes[message["rank"]] = message["code"]
            ended.seconds[message["rank"]] = message["seconds"]

    def train(self, world: int, run_dir: Path, settings: Sequence[str], fault: str = "", **options) -> Ended:
        """meter_fast.train with recipe, settings and run.dir; records what each step saw (see workers.train). fault: as
        faults.py says."""
        argv = ["pretrain", "size=tiny", f"run.dir={run_dir}", *settings]
        return self.run(world, run_dir / "logs", "workers:train", argv=argv, fault=fault, **options)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(json.loads(line))


def stop(pid: int, number: int) -> None:
    """Signal a process that may have ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Poll. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
