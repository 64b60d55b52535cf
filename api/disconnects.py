"""Notices that a client has gone without waiting for the next write.

gunicorn puts the connection's socket into the WSGI environment; a peek tells the end of the stream from a request that
was sent ahead. Behind such a request the end cannot be read: then Linux is asked for the connection's state, and
elsewhere the next write notices. A client that only shuts down its sending side counts as gone, as it does for most
proxies.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import gevent
from gevent.socket import wait_read

CHECK = 1.0  # seconds between two looks at a connection on which a request was sent ahead
ESTABLISHED = 1  # TCP_ESTABLISHED: neither side has closed


def watch(environ: Mapping[str, Any], on_gone: Callable[[], None]) -> Callable[[], None]:
    """Call `on_gone` once if the client disconnects. Returns what ends the watch."""
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return lambda: None
    watcher = gevent.spawn(_wait, connection, on_gone)
    return lambda: watcher.kill(block=False)


def _wait(connection: Any, on_gone: Callable[[], None]) -> None:
    try:
        wait_read(connection.fileno())
        while connection.recv(1, socket.MSG_PEEK) != b"" and not _is_closing(connection):
            gevent.sleep(CHECK)
    except (OSError, ValueError):
        pass
    on_gone()


def _is_closing(connection: Any) -> bool:
    if sys.platform != "linux":
        return False
    state: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != ESTABLISHED
