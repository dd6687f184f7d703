"""A process that has imported everything and forks the ranks on request: imports take ten seconds, forks none.

Speaks JSON, a line a message. In:
    {"world": 2, "log": "FOLDER", "env": {}, "target": "module:function", "arguments": {}}
Out: {"pids": [...]}, then {"rank": 0, "code": 0, "seconds": 1.2} as each ends, then {"done": true}. Each rank is a real
process with the launcher's environment, its output in LOG/rank-N.log; it runs target(**arguments), an exit code.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def serve() -> None:
    """Import once, then answer requests until the input ends."""
    import torch

    import meter_fast.train  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, whose choice the trainer respects
    say({"ready": True})
    for line in sys.stdin:
        run(json.loads(line))


def run(request: dict) -> None:
    """Fork the ranks, report how each ends."""
    port = free_port()
    began = time.monotonic()
    ranks = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            be_rank(request, rank, port)
        ranks[pid] = rank
    say({"pids": list(ranks)})
    while ranks:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        say({"rank": ranks.pop(pid), "code": code, "seconds": time.monotonic() - began})
    say({"done": True})


def be_rank(request: dict, rank: int, port: int) -> None:
    """What a launcher would start. Never returns."""
    log = os.open(Path(request["log"], f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(0)
    world = str(request["world"])
    address = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(request.get("env", {}), **address, MASTER_PORT=str(port))
    module, _, function = request["target"].partition(":")
    code = 99
    try:
        code = getattr(importlib.import_module(module), function)(**request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 99:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    serve()
