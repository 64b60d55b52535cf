"""Gives this node's files to other nodes: `python -m workers.node.holder`, a child of the node.

Serves `GET` and `HEAD` of `/blobs/<sha256>`, with `Range`, to who shows a ticket for that file of this node, and nothing
else. With a part that ends where a piece does comes the SHA-256 of the file's beginning up to there, as it was when the
file was verified. Owns this HTTP and its limits. What files there are is the store's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from localai_q.cluster import tickets
from localai_q.cluster.holders import is_loopback
from localai_q.config import Settings, settings
from localai_q.errors import StartupError
from localai_q.names import BEGINNING_HEADER
from localai_q.processes import watch_parent
from workers.child import StatusPipe, read_spec
from workers.identity import Identity
from workers.node.store import Store

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
MOST_TRANSFERS = 32
HEADERS_WITHIN = 10.0  # seconds
LARGEST_HEADERS = 8 << 10  # bytes
SLICE = 1 << 20  # bytes that a reader must take within `SLICE_WITHIN`
SLICE_WITHIN = 30.0  # seconds
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104


class Holder:
    """The files of one node, and how many of them are on their way."""

    def __init__(self, node_id: str, identity: Identity, store: Store) -> None:
        self.store = store
        self.transfers = 0
        self._node_id = node_id
        self._identity = identity

    def admits(self, ticket: str, sha256: str) -> bool:
        return tickets.is_valid(ticket, self._identity.hashes, self._node_id, sha256, now=time.time())

    def application(self) -> Application:
        return Application([(r"/blobs/([0-9a-f]{64})", _File, {"holder": self})], log_function=_no_log)


class _File(RequestHandler):
    SUPPORTED_METHODS = ("GET", "HEAD")

    def initialize(self, holder: Holder) -> None:
        self._holder = holder

    def set_default_headers(self) -> None:
        self.clear_header("Server")

    def compute_etag(self) -> None:
        """None: the path is one."""

    def write_error(self, status_code: int, **_: Any) -> None:
        self.finish()

    async def head(self, sha256: str) -> None:
        with self._opened(sha256) as file:
            self._describe(sha256, file)

    async def get(self, sha256: str) -> None:
        with self._opened(sha256) as file:
            start, end = self._describe(sha256, file)
            if self._holder.transfers >= MOST_TRANSFERS:
                raise HTTPError(503)
            self._holder.transfers += 1
            try:
                self.set_header("Connection", "close")
                await self.flush()
                await _send(self.detach(), file, start, end)
            finally:
                self._holder.transfers -= 1

    def _opened(self, sha256: str) -> IO[bytes]:
        kind, _, ticket = self.request.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or not self._holder.admits(ticket, sha256):
            raise HTTPError(403)
        try:
            return (self._holder.store.folder / sha256).open("rb")
        except OSError as error:
            raise HTTPError(404) from error

    def _describe(self, sha256: str, file: IO[bytes]) -> tuple[int, int]:
        """Set status and headers; from where to where the part is that was asked for."""
        size = os.fstat(file.fileno()).st_size
        asked = self.request.headers.get("Range", "")
        start, end = _range(asked, size)
        if asked:
            self.set_status(206)
            self.set_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Accept-Ranges", "bytes")
        self.set_header("Content-Length", str(end - start))
        if beginning := sha256 if end == size else self._holder.store.beginning(sha256, end):
            self.set_header(BEGINNING_HEADER, beginning)
        return start, end


def _range(asked: str, size: int) -> tuple[int, int]:
    if not asked:
        return 0, size
    found = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{1,18})?", asked)
    start = int(found[1]) if found else size
    end = min(int(found[2]) + 1, size) if found and found[2] else size
    if start >= end:
        raise HTTPError(416)
    return start, end


async def _send(stream: IOStream, file: IO[bytes], start: int, end: int) -> None:
    loop = asyncio.get_running_loop()
    try:
        for at in range(start, end, SLICE):
            count = min(SLICE, end - at)
            await asyncio.wait_for(loop.sock_sendfile(stream.socket, file, at, count), SLICE_WITHIN)
    except (OSError, TimeoutError) as error:
        log.info("a transfer ended early: %s", error or f"a reader took less than {SLICE} bytes in {SLICE_WITHIN} s")
    finally:
        stream.close()


class Server(HTTPServer):
    """An HTTP server for a limited number of connections."""

    def initialize(self, *args: Any, **more: Any) -> None:
        super().initialize(
            *args, **more, idle_connection_timeout=HEADERS_WITHIN, max_header_size=LARGEST_HEADERS, max_body_size=0,
            body_timeout=HEADERS_WITHIN,
        )  # fmt: skip
        self._open = 0

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        if self._open >= MOST_CONNECTIONS:
            stream.close()
            return
        self._open += 1
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        self._open -= 1
        super().on_close(server_conn)


def addresses(cfg: Settings, api_url: str) -> tuple[str, int, str]:
    """Where to listen: a host and a port, 0 for a free one; and the host by which others reach that.

    What is not set follows from the address by which this machine reaches the API. Over loopback that is the API's own
    machine: where the API listens on more than loopback, the files are to be had there, too.

    Raises:
        StartupError: the API's host cannot be resolved.
    """
    host, _, port = cfg.files_address.rpartition(":")
    own = _own_address(api_url)
    if is_loopback(own) and not is_loopback(cfg.host):
        own = "0.0.0.0"  # noqa: S104
    host = host.strip("[]") or own
    return host, int(port or 0), own if host in EVERYWHERE else host


def _own_address(api_url: str) -> str:
    """The address of this machine that its packets to the API come from."""
    parts = urlsplit(api_url)
    try:
        family, kind, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0]).partition("%")[0]  # a zone means nothing to others
    except OSError as error:
        raise StartupError(f"cannot tell by which address this machine reaches {api_url}: {error}") from error


def _no_log(_: RequestHandler) -> None:
    """Requests are not logged one by one."""


async def _serve(cfg: Settings) -> None:
    spec = read_spec()
    pipe = StatusPipe(spec.status_fd)
    holder = Holder(spec.node_id, Identity(spec.identity), Store(Path(spec.models)))
    host, port, reached = addresses(cfg, spec.api_url)
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        pipe.say("failed", f"cannot listen on {host}:{port}, which LOCALAI_HTTP_ADDR may set: {error}")
        raise SystemExit(1) from error
    port = sockets[0].getsockname()[1]
    reached = f"[{reached}]" if ":" in reached else reached
    shown = cfg.advertised_files_address or f"{reached}:{port}"
    Server(holder.application()).add_sockets(sockets)
    pipe.figures = lambda: {"files_address": shown, "transfers": holder.transfers}
    pipe.say("ready")
    await asyncio.Event().wait()


def main() -> None:
    """Serve until the node ends."""
    logging.basicConfig(level=settings().log_level, format="%(asctime)s %(levelname)s %(message)s")
    watch_parent(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    asyncio.run(_serve(settings()))


if __name__ == "__main__":
    main()
