"""A process that is asked to stop in the middle of a call that never asks Python for signals."""

import signal
import subprocess
import sys
import time

import pytest

from meter_fast.training.interruption import ECHO_SECONDS

BUSY = """
import hashlib
from meter_fast.training.interruption import StopRequest
stop = StopRequest()
stop.listen()
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)  # minutes, without the interpreter's lock
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_waits(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a batch job's children ignore it
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "busy\n"
        process.send_signal(number)
        process.send_signal(number)  # an echo of the first one
        time.sleep(ECHO_SECONDS + 1)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
        process.wait()
