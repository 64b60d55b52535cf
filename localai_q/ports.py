"""TCP ports of this machine: whether one is free, who holds it, and choosing one that stays free.

It leaves to its callers what to say when a port is not free.
"""

from __future__ import annotations

import random
import socket

import psutil

# Below the range that Linux and macOS give to outgoing connections, so that no client takes a port between two starts.
LOWEST, HIGHEST = 20_000, 32_000


def check_bind(host: str, port: int) -> None:
    """Listen on `host:port` for a moment.

    Raises:
        OSError: it cannot be listened on; `errno` tells why. `socket.gaierror` for an unknown host.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        probe.listen(1)


def is_free(host: str, port: int) -> bool:
    """Whether `host:port` can be listened on now."""
    try:
        check_bind(host, port)
    except OSError:
        return False
    return True


def choose(host: str = "127.0.0.1") -> int:
    """A port that is free now and likely to be free at the next start.

    Raises:
        OSError: `host` cannot be listened on at all.
    """
    for port in random.sample(range(LOWEST, HIGHEST), 200):
        if is_free(host, port):
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder(port: int) -> str:
    """What listens on `port`, as 'NAME (pid N)'; 'another program' where this user may not see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            local_port = getattr(connection.laddr, "port", None)
            if connection.status == psutil.CONN_LISTEN and local_port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return "another program"
