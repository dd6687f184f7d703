"""Ways in which a run is asked to end before its time: signals, and a launcher that died.

Knows the process and its ancestors. Knows nothing of training. A signal only sets a flag: saving is collective work, so
the processes first agree on it, at the end of the step.
"""

import os
import signal
import sys
import threading
import time
from typing import TextIO

import psutil

EXIT_INTERRUPTED = 75  # sysexits.h EX_TEMPFAIL: stopped on request after saving; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "meter-fast"}

# Launchers pass a signal on that the terminal or the batch system has already sent to every process of the group. Those
# echoes arrive within moments and are the same request; whoever really asks twice waits at least this long.
ECHO_SECONDS = 2.0


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGHUP, or when the launcher is gone. A second signal ends the process at once, even
    where it waits for a peer: Python would call a handler only after that, and but once."""

    def __init__(self) -> None:
        self.reason = ""
        self._since = 0.0
        self._launchers = [p for p in psutil.Process().parents() if _is_launcher(p)]

    def listen(self) -> None:
        """Listen from now on (to be called in the main thread). SIGHUP stays ignored where nohup has asked for that."""
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._note(number))

    def pending(self) -> bool:
        """True once this process has a reason to stop; `reason` says which."""
        if not self.reason and not all(_is_alive(p) for p in self._launchers):
            self._since, self.reason = time.monotonic(), "the launcher is gone"
        return bool(self.reason)

    def _listen(self, heard: int) -> None:
        """Runs in a thread of its own: a byte comes for each signal, whatever the main thread does."""
        while True:
            for number in os.read(heard, 64):
                if number not in SIGNALS:
                    continue
                if self.reason and time.monotonic() - self._since > ECHO_SECONDS:
                    os._exit(128 + number)
                self._note(number)

    def _note(self, number: int) -> None:
        if number == signal.SIGHUP:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, _Terminal):
                    stream.let_go()
        if not self.reason:
            self._since, self.reason = time.monotonic(), signal.Signals(number).name


def _is_launcher(process: psutil.Process) -> bool:
    """`python .../bin/deepspeed ...`, `python -u -m deepspeed.launcher.launch ...`, the same of torchrun, or `python
    .../bin/meter-fast ...`, which starts runs again; not a shell that names them."""
    try:
        program, *arguments = process.cmdline() or [""]
    except psutil.Error:  # not ours to read, or gone meanwhile
        return False
    named = {os.path.basename(argument) for argument in arguments[:3]}
    return "python" in os.path.basename(program) and bool(named & LAUNCHERS)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def outlive_terminal() -> None:
    """From now on a terminal that is closed ends neither the run nor its last checkpoint: output then goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name).isatty():
            setattr(sys, name, _Terminal(getattr(sys, name)))


class _Terminal:
    """A text stream of a terminal. Writing may fail before the signal of its end has been heard; once closed, it no
    longer says that it was a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self.let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self.let_go()

    def let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
