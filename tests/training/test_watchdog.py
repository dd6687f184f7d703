"""A run that hangs ends by itself: where it hung is shown, and who of the others was where."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ranks import RankServer, stop, wait_until
from small_run import losses, settings

from meter_fast.training.peers import Place, ask

STUCK = """
import sys, time
from meter_fast.training import watchdog
watchdog.LAST_RESORT = 1
watchdog.expect_progress(1)
if sys.argv[1] == "rest":
    watchdog.no_watchdog()
    time.sleep(3)
    sys.exit(0)
if sys.argv[1] == "lock":  # a call that lets no other thread of Python run
    import ctypes
    ctypes.PyDLL(None).sleep(100)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("sleep", 1, "no progress for 1 s (run.hang_seconds)"), ("lock", 1, "Timeout"), ("rest", 0, "")],
)
def test_a_process_that_hangs(how, code, said):
    done = subprocess.run([sys.executable, "-c", STUCK, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr
    assert ("most recent call first" in done.stderr) == (code == 1)


def listening(answer) -> Place:
    """A process that answers as said."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    return Place(1, "node2", *server.getsockname(), True)


@pytest.mark.parametrize(
    ("said", "reached", "text"),
    [
        (b'{"phase": "data", "seconds": 7.2, "step": 4}', True, "is in data for 7 s, step 4"),
        (b'{"phase": "reduce", "seconds": 1, "step": -1}', True, "waits for the others in a collective for 1 s"),
        (b"GET / HTTP/1.1", True, "does not answer ("),
        (b'{"phase": "data"}', True, "does not answer ("),
        (None, True, "does not answer: it is stopped"),
    ],
)
def test_answers(said, reached, text, monkeypatch):
    monkeypatch.setattr("meter_fast.training.peers.ANSWER_SECONDS", 0.5)
    held = []

    def answer(connection: socket.socket) -> None:
        if said is None:
            held.append(connection)
        else:
            with connection:
                connection.sendall(said)

    got = ask(listening(answer))
    assert got.reached == reached and got.text.startswith(text)


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place(1, "node2", *server.getsockname(), True)
    assert ask(place).text == "has ended" and not ask(place).reached


def hung(ranks: RankServer, data: Path, run: Path, *more: str, **place) -> list[str]:
    """Two ranks of which one hangs. Both end with code 1; returns what each said."""
    chosen = settings(data, "run.max_steps=6", "run.save_every=2", "run.hang_seconds=40", *more)
    argv = ["pretrain", "size=tiny", f"run.dir={run}", *chosen]
    ended = ranks.run(2, run / "logs", "slow_workers:train", argv=argv, seconds=600, timeout=100, **place)
    assert ended.codes == [1, 1], "\n".join(ended.logs)
    return ended.logs


def line_of(text: str, begin: str) -> str:
    """The first line that begins so."""
    return next((line for line in text.splitlines() if line.startswith(begin)), f"no line {begin!r} in:\n{text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "more", "phase"),
    [
        ("starting", 1, (), "in starting for"),
        ("loader thread", 1, ("data.workers=1",), "in data for"),
        ("saving", 0, ("run.async_save=false",), "in evaluation or saving for"),
    ],
)
@pytest.mark.scenario(36, "stuck in start-up, a loader thread or saving: rank and phase are named, all end")
def test_a_rank_that_hangs_is_named_and_both_end(ranks, data, tmp_path, where, rank, more, phase):
    logs = hung(ranks, data, tmp_path / "run", *more, where=where, on_rank=rank)
    assert f"error: rank {rank} on " in logs[rank] and "makes no progress for 40 s (run.hang_seconds)" in logs[rank]
    assert "slow_workers.py" in logs[rank] and "most recent call first" in logs[rank]
    for said in logs:  # each tells where both are
        line, other = (line_of(said, f"  rank {which} on ") for which in (rank, 1 - rank))
        assert phase in line, said
        assert "waits for the others in a collective" in other, said


@pytest.mark.slow
@pytest.mark.scenario(4, "the process that is left names the one that was killed")
def test_the_rank_that_was_killed_is_named(ranks, data, tmp_path):
    run = tmp_path / "run"

    def kill(pids: list[int]) -> None:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 2)
        stop(pids[1], signal.SIGKILL)

    ended = ranks.train(2, run, settings(data, "run.max_steps=99999", "run.save_every=99999"), meanwhile=kill)
    assert ended.codes == [1, -signal.SIGKILL]
    assert "rank 1 on " in ended.logs[0] and "has ended" in ended.logs[0], ended.logs[0]
