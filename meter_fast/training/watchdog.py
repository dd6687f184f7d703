"""Ends a process that makes no progress, and says why: stacks, where every process of the run is, who is silent.

Knows clocks and peers. Knows nothing of training. It works inside a collective that waits for a silent peer, whatever
that group's own timeout.
"""

import faulthandler
import os
import sys
import threading
import time

from meter_fast.training.peers import ANSWER_SECONDS, Peers

EXIT_FAILED = 1
TICK = 0.5  # seconds between looks
# After its last word a process stays so long: others may ask it where it hung.
LINGER = 2 * ANSWER_SECONDS
# Where no thread of Python gets to run: so long after its time the stacks are printed and the process ended from C.
LAST_RESORT = 30
AGAIN = "When that is mended, the same command goes on from the last checkpoint"


class Watchdog:
    """One for a process. Asleep until `expect`."""

    def __init__(self) -> None:
        self._expected: tuple[float, float] | None = None  # (since, seconds); replaced as a whole
        self._peers: Peers | None = None
        self._peer_seconds = 0.0
        self._thread: threading.Thread | None = None

    def expect(self, seconds: int) -> None:
        """(Re)start: unless called again within `seconds`, the process prints the stack of every thread and ends."""
        faulthandler.dump_traceback_later(seconds + LAST_RESORT, exit=True)
        self._expected = (time.monotonic(), seconds)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def watch(self, peers: Peers | None, seconds: float) -> None:
        """Without progress, ask the peers, too: where one has been silent, the process ends `seconds` after the last
        progress. None: no longer."""
        self._peers, self._peer_seconds = peers, seconds

    def rest(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
        self._expected = None

    def _watch(self) -> None:
        asked = 0.0
        while True:
            time.sleep(TICK)
            expected, peers = self._expected, self._peers
            if expected is None:
                continue
            since, seconds = expected
            waited = time.monotonic() - since
            if waited >= seconds:
                self._end_hung(waited, peers)
            if peers is None or waited < self._peer_seconds / 2:
                continue
            if asked < since:
                peers.forget()
            if time.monotonic() - asked < self._peer_seconds / 10:
                continue
            silent, asked = peers.silent(), time.monotonic()
            gone = [text for text, silence in silent if silence >= self._peer_seconds / 3]
            if gone and self._expected == expected and self._peers is peers:
                self._end_without(gone, peers)

    def _end_hung(self, waited: float, peers: Peers | None) -> None:
        who = f"{peers.own} makes" if peers else "this process makes"
        _say(f"error: {who} no progress for {waited:.0f} s (run.hang_seconds). The stacks of its threads:")
        faulthandler.dump_traceback(all_threads=True)
        if peers:
            lines = "\n".join(f"  {line}" for line in peers.where())
            _say(f"where the processes of the run are:\n{lines}\nThose that are not in a collective keep the others "
                 f"waiting. {AGAIN}")  # fmt: skip
        time.sleep(LINGER)
        os._exit(EXIT_FAILED)

    def _end_without(self, gone: list[str], peers: Peers) -> None:
        phase, seconds = peers.phases.now()
        said = "\n".join(f"  {text}" for text in gone)
        _say(f"error: {peers.own} ends, because others are gone for {self._peer_seconds:g} s (run.peer_seconds); it is "
             f"in {phase} for {seconds:.0f} s, step {peers.phases.step}:\n{said}\n{AGAIN}")  # fmt: skip
        os._exit(EXIT_FAILED)


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


_watchdog = Watchdog()
expect_progress, watch_peers, no_watchdog = _watchdog.expect, _watchdog.watch, _watchdog.rest
