"""A server of files on loopback that behaves, or not, as a test says: ranges, ETags, redirects, cuts, stalls."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Remote:
    """What lies behind a path."""

    content: bytes = b""
    etag: str = ""
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # after how many bytes each connection breaks off
    statuses: list[int] = field(default_factory=list)  # what the first requests are answered instead
    headers: dict[str, str] = field(default_factory=dict)
    location: str = ""  # where it redirects to
    announced: int | None = None  # bytes that it says it has, rather than it has; -1: it does not say
    pause: float = 0.0  # seconds between two blocks
    endless: bool = False
    key: str = ""  # an Authorization that it wants
    block: int = 1 << 16


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]


Answer = Callable[[Seen], Remote | None]


class FileServer:
    def __init__(self) -> None:
        self.files: dict[str, Remote] = {}
        self.seen: list[Seen] = []
        self.answer: Answer = lambda seen: self.files.get(seen.path.partition("?")[0])
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_address[1]}"
        self.url = f"http://{self.host}"

    def put(self, path: str, remote: Remote) -> str:
        """Have the path mean this; its URL."""
        self.files[path] = remote
        return self.url + path

    def ranges(self) -> list[str]:
        return [seen.headers.get("range", "") for seen in self.seen if seen.method == "GET"]


@contextmanager
def serve() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        seen = Seen(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.owner.seen.append(seen)
        remote = self.owner.answer(seen)
        if remote is None:
            return self._say(404, {})
        if remote.statuses:
            return self._say(remote.statuses.pop(0), {"Retry-After": "0"})
        if remote.key and seen.headers.get("authorization") != remote.key:
            return self._say(401, remote.headers)
        if remote.location:
            return self._say(302, {**remote.headers, "Location": remote.location})
        with suppress(OSError):
            self._send(remote, seen)
        return None

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, remote: Remote, seen: Seen) -> None:
        start = self._start(remote, seen)
        if start and start >= len(remote.content):
            return self._say(416, {})
        body = remote.content[start:]
        length = len(body) if remote.announced is None else remote.announced
        headers = dict(remote.headers)
        if length >= 0:
            headers["Content-Length"] = str(length)
        if remote.etag:
            headers["ETag"] = remote.etag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(remote.content) - 1}/{len(remote.content)}"
        self.send_response(206 if start or "Content-Range" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = remote.cuts.pop(0) if remote.cuts else len(body)
        for at in range(0, end, remote.block):
            self.wfile.write(body[at : min(at + remote.block, end)])
            time.sleep(remote.pause)
        while remote.endless:
            self.wfile.write(bytes(remote.block))
        return None

    def _start(self, remote: Remote, seen: Seen) -> int:
        asked = seen.headers.get("range", "")
        condition = seen.headers.get("if-range")
        if not asked or not remote.ranges or (condition and condition != remote.etag):
            return 0
        return int(asked.removeprefix("bytes=").partition("-")[0])
