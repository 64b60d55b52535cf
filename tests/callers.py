"""Clients that remember what they saw: each request in a thread of its own, with every event, its id and its time."""

import contextlib
import http.client
import itertools
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

from e2e_cluster import until
from waiting import LIMIT

LONGEST = 60.0  # seconds without a byte after which a client gives up


@dataclass(frozen=True)
class Seen:
    """One event of a stream that carried text, or the end of it."""

    at: float
    id: str
    text: str


def numbers(tokens: int, **directives: float) -> str:
    """What has the echo backend say so many numbers; `counted` is what it then says."""
    more = "".join(f" {name}={value:g}" for name, value in directives.items())
    return f"[[echo tokens={tokens}{more}]]"


def counted(tokens: int, seed: int = 0) -> str:
    return " ".join(map(str, range(seed, seed + tokens)))


class Caller:
    """One HTTP request and what came of it."""

    def __init__(
        self,
        address: str,
        key: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.events: list[Seen] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.error: dict[str, Any] | None = None
        self.complete = False  # the whole answer came: `[DONE]`, or a body of status 200
        self.after = (headers or {}).get("Last-Event-ID", "")
        self.reading = threading.Event()  # cleared: nothing is read from the connection
        self.reading.set()
        self.began = time.monotonic()
        self.took = 0.0
        self._host, port = address.split(":")
        self._connection = http.client.HTTPConnection(self._host, int(port), timeout=LONGEST)
        sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})}
        content = None if body is None else json.dumps(body)
        self._thread = threading.Thread(target=self._run, args=(method, path, content, sent), daemon=True)
        self._thread.start()

    # What it saw.

    @property
    def text(self) -> str:
        return "".join(seen.text for seen in self.events)

    @property
    def said(self) -> int:
        """How many words came."""
        return len(self.text.split())

    @property
    def job(self) -> str:
        return self.headers.get("x-localai-job", "")

    @property
    def last_id(self) -> str:
        return next((seen.id for seen in reversed(self.events) if seen.id), "")

    @property
    def longest_gap(self) -> float:
        """Seconds between two pieces of text, at most."""
        times = [seen.at for seen in self.events if seen.text]
        return max((later - sooner for sooner, later in itertools.pairwise(times)), default=0.0)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def until_said(self, words: int, timeout: float = LIMIT) -> "Caller":
        until(lambda: self.said >= words or self.ended, timeout, f"{words} words, after {self.text[-200:]!r}")
        assert self.said >= words, (self.text, self.status, self.body, self.error)
        return self

    def wait(self, timeout: float = LIMIT) -> "Caller":
        """Until the answer has ended, however it did."""
        self._thread.join(timeout)
        assert self.ended, f"job {self.job} goes on after {timeout:g} s: {self.text[-200:]!r}"
        return self

    def whole(self, timeout: float = LIMIT) -> str:
        """The text of an answer that must come to its end."""
        self.wait(timeout)
        assert self.complete, (self.job, self.status, self.text[-200:], self.error, self.body[:500])
        return self.text

    def cut(self, how: str = "FIN") -> None:
        """Go away: with a FIN, or with a RST."""
        connection = self._connection.sock
        if connection is not None:
            with contextlib.suppress(OSError):  # an answer that ends at this moment closes it, too
                self._hang_up(connection, how)
        self.reading.set()
        self._thread.join(LIMIT)

    @staticmethod
    def _hang_up(connection: socket.socket, how: str) -> None:
        if how == "RST":  # nothing is sent until the descriptor is closed, which then resets
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RD)
        else:
            connection.shutdown(socket.SHUT_RDWR)

    # How it sees.

    def _run(self, method: str, path: str, content: str | None, headers: dict[str, str]) -> None:
        try:
            self._connection.request(method, path, content, headers)
            self._read(self._connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass  # cut, or refused: what was seen tells
        finally:
            self.took = time.monotonic() - self.began
            self._connection.close()

    def _read(self, answer: http.client.HTTPResponse) -> None:
        self.headers = {name.lower(): value for name, value in answer.getheaders()}
        self.status = answer.status
        if "text/event-stream" in self.headers.get("content-type", ""):
            self._follow(answer)
            return
        self.body = answer.read()
        said = json.loads(self.body)
        self.error = said.get("error")
        if self.status == 200 and "choices" in said:
            self._note("", said["choices"][0]["message"]["content"])
            self.complete = True

    def _follow(self, answer: http.client.HTTPResponse) -> None:
        event_id = ""
        while line := answer.readline():
            self.reading.wait()
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value == "[DONE]":
                self.complete = True
            elif name == "data":
                self._take(event_id, json.loads(value))
                event_id = ""

    def _take(self, event_id: str, data: dict[str, Any]) -> None:
        if "error" in data:
            self.error = data["error"]
            return
        choice = (data.get("choices") or [{}])[0]
        self._note(event_id, choice.get("delta", choice).get("content") or choice.get("text") or "")

    def _note(self, event_id: str, text: str) -> None:
        self.events.append(Seen(time.monotonic(), event_id, text))
