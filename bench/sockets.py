"""A client that costs little: one process, one thread, raw sockets. Owns connections that are held open or drunk empty.

It runs in a process of its own, so that what it costs is not taken for the server's; `Helper` is its handle.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import time
from types import TracebackType
from typing import Any, Self

from bench.cluster import Cluster

OPENING = 300  # connections that wait for their headers at once
PATIENCE = 300.0  # seconds for one order


def request_for(cluster: Cluster, model: str, order: str) -> bytes:
    """A streamed chat whose only message is `order`."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": order}], "stream": True}).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {cluster.host}\r\nAuthorization: Bearer {cluster.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
    return head.encode() + body


class Helper:
    """The process, and what it can be told to do."""

    def __init__(self, host: str, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, (host, port)), daemon=True)
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join(5)

    def drink(self, request: bytes, streams: int) -> tuple[float, int]:
        """Read so many streams to their end, all at once: seconds, and the events that came."""
        seconds, events = self._ask("drink", request, streams)
        return float(seconds), int(events)

    def hold(self, request: bytes, streams: int) -> float:
        """Have so many streams open and leave them so; returns the seconds until all had their headers."""
        return float(self._ask("hold", request, streams))

    def _ask(self, *order: Any) -> Any:
        self._pipe.send(order)
        if not self._pipe.poll(PATIENCE):
            raise RuntimeError(f"the client did not get through {order[0]} {order[2]} in {PATIENCE:.0f} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Any, address: tuple[str, int]) -> None:
    held: list[socket.socket] = []
    while True:
        what, request, streams = pipe.recv()
        try:
            pipe.send(_drink(address, request, streams) if what == "drink" else _hold(address, request, streams, held))
        except (OSError, RuntimeError) as error:
            pipe.send(error)


def _connect(address: tuple[str, int], request: bytes) -> socket.socket:
    connection = socket.create_connection(address, timeout=30)
    connection.sendall(request)
    connection.setblocking(False)
    return connection


def _drink(address: tuple[str, int], request: bytes, streams: int) -> tuple[float, int]:
    started, events, left = time.perf_counter(), 0, streams
    ends = dict.fromkeys(range(streams), b"")  # a mark may lie across two reads
    with selectors.DefaultSelector() as selector:
        for number in range(streams):
            selector.register(_connect(address, request), selectors.EVENT_READ, number)
        while left:
            for key, _ in selector.select(30):
                data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
                events += data.count(b"id: ")
                ends[key.data] = (ends[key.data] + data)[-64:]
                if b"[DONE]" in ends[key.data] or not data:
                    if not data:
                        raise RuntimeError(f"a stream broke off: {ends[key.data]!r}")
                    left -= 1
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return time.perf_counter() - started, events


def _hold(address: tuple[str, int], request: bytes, streams: int, held: list[socket.socket]) -> float:
    started = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        waiting = 0
        while len(held) < streams or waiting:
            while len(held) < streams and waiting < OPENING:
                held.append(_connect(address, request))
                selector.register(held[-1], selectors.EVENT_READ)
                waiting += 1
            for key, _ in selector.select(60):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"a stream was refused: {data[:300]!r}")
                selector.unregister(key.fileobj)
                waiting -= 1
    return time.perf_counter() - started
