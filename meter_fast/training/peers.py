"""Asks the other processes of a run what they are doing.

Knows addresses, sockets and phases. Knows nothing of training. Each process answers with its step and phase to whoever
connects, in a thread of its own and without reading anything; in a run without trouble nobody asks.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address

from meter_fast.training.phases import REDUCE, Phases
from meter_fast.training.world import World

ANSWER_SECONDS = 3.0
AT_ONCE = 32


@dataclass(frozen=True)
class Place:
    """Where a process answers. `lead`: it is the first of its host."""

    rank: int
    host: str
    address: str
    port: int
    lead: bool

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


@dataclass(frozen=True)
class Answer:
    """What became of a question. reached: somebody answered; text: for people."""

    reached: bool
    text: str


class Peers:
    """All processes of a run. Building it is collective. `own`: this process; `unwatched`: those of other hosts that do
    not answer although all is well, in words.

    The first process of each host asks for all on it, so that many do not ask very many."""

    def __init__(self, world: World) -> None:
        self.phases = world.phases
        address = own_address(os.environ["MASTER_ADDR"])
        elsewhere = [one for one in world.share(address) if not ip_address(one).is_loopback]
        if ip_address(address).is_loopback and elsewhere:  # the main host knows itself by its name: Debian's 127.0.1.1
            address = own_address(elsewhere[0])
        listener = listen(address)
        threading.Thread(target=_answer, args=(listener, self.phases), name="answers", daemon=True).start()
        port = listener.getsockname()[1]
        told = world.share([socket.gethostname(), address, port, world.local_rank == 0])
        self.places = [Place(rank, *place) for rank, place in enumerate(told)]
        self.own = self.places[world.rank]
        self._near = [place for place in self.places if self.own.lead or place.address == address]
        self._watched = [place for place in self._near if place.lead and place.address != address]
        answers = dict(zip(self._watched, ask_all(self._watched)))
        self.unwatched = [f"{place} {answer.text}" for place, answer in answers.items() if not answer.reached]
        self._watched = [place for place in self._watched if answers[place].reached]
        self._silent: dict[Place, float] = {}

    def silent(self) -> list[tuple[str, float]]:
        """First processes of other hosts that do not answer now: what is known, and seconds since this was first found
        and has not changed."""
        now = time.monotonic()
        answers = dict(zip(self._watched, ask_all(self._watched)))
        self._silent = {p: self._silent.get(p, now) for p, answer in answers.items() if not answer.reached}
        return [(f"{place} {answers[place].text}", now - since) for place, since in self._silent.items()]

    def forget(self) -> None:
        """There is progress again: what was silent once may be silent anew."""
        self._silent = {}

    def where(self) -> list[str]:
        """A line for each process that this one asks, itself included."""
        return [f"{place} {answer.text}" for place, answer in zip(self._near, ask_all(self._near))]

    def missing(self) -> list[str]:
        """The lines of those that do not answer."""
        return [
            f"{place} {answer.text}" for place, answer in zip(self._near, ask_all(self._near)) if not answer.reached
        ]


def own_address(other: str) -> str:
    """That of the interface by which this process reaches another host. Raises OSError where it does not."""
    family, kind, _, _, target = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as trial:
        trial.connect(target)  # sends nothing
        return trial.getsockname()[0]


def listen(address: str) -> socket.socket:
    """A listening socket there, at a port that is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=AT_ONCE)


def ask_all(places: Sequence[Place]) -> list[Answer]:
    """Their answers, in order."""
    if not places:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(places))) as pool:
        return list(pool.map(ask, places))


def ask(place: Place) -> Answer:
    """What a process is doing, or why that is not known; takes ANSWER_SECONDS at most for each of the two."""
    try:
        connection = socket.create_connection((place.address, place.port), ANSWER_SECONDS)
    except ConnectionRefusedError:
        return Answer(False, "has ended")
    except OSError as error:
        return Answer(False, f"cannot be reached ({error.strerror or error}): its machine or the link is down")
    try:
        with connection:
            said = json.loads(connection.makefile("rb").read(4096))
        return Answer(True, describe(str(said["phase"]), float(said["seconds"]), int(said["step"])))
    except TimeoutError:
        return Answer(True, "does not answer: it is stopped, or busy in a call that lets nothing else run")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Answer(True, f"does not answer ({error})")


def describe(phase: str, seconds: float, step: int) -> str:
    """What a process is doing, for people."""
    what = "waits for the others in a collective" if phase == REDUCE else f"is in {phase}"
    return f"{what} for {seconds:.0f} s" + (f", step {step}" if step >= 0 else "")


def _answer(listener: socket.socket, phases: Phases) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            phase, seconds = phases.now()
            with connection:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(json.dumps({"phase": phase, "seconds": seconds, "step": phases.step}).encode())
        except OSError:  # who asked has gone meanwhile
            time.sleep(0.1)
