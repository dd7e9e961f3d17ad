"""A port for the processes that a test starts."""

import contextlib
import secrets
import socket


def free_port() -> int:
    """A port that nobody has, below those that systems hand out by themselves: nobody has it a moment later either."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
