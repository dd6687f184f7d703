"""A port for the processes of a run to meet at. Knows sockets alone, so that commands can ask before anything heavy is
loaded."""

import socket


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
