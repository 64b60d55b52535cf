"""Notices that a client has gone without waiting for the next write.

gunicorn puts the connection's socket into the WSGI environment; a peek tells the end of the stream from a request that
was sent ahead. A client that only shuts down its sending side counts as gone, as it does for most proxies.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import gevent
from gevent.socket import wait_read


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
        gone = connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        gone = True
    if gone:
        on_gone()
