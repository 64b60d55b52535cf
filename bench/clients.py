"""A client that does what a careful one would: it comes back, asks again where it was refused, notes what it saw.

One `Asked` is one job from its submission to its end. Owns how a client behaves; when it asks is its caller's business.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from bench.cluster import Cluster
from bench.tally import TALKING

AGAIN = 0.2  # seconds before a client comes back, as the API's own `retry:` says
SILENCE = 30.0  # seconds without a byte after which a connection counts as broken; comments come every 10
REFUSALS = (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE)


@dataclass
class Asked:
    """One job as its client sees it."""

    kind: str  # stream | whole | background
    tokens: int
    delay_ms: float
    job: str = ""  # once the client was told
    text: str = ""
    said: list[float] = field(default_factory=list)  # monotonic times of events that carried text
    last_id: str = ""
    out_of_order: bool = False  # an event came that was not behind the one before
    outcome: str = ""  # done | failed
    reason: str = ""
    refused: int = 0
    unheard: int = 0
    resumed: int = 0

    @property
    def words(self) -> list[int]:
        return [int(word) if word.isdigit() else -1 for word in self.text.split()]

    @property
    def talks(self) -> bool:
        """Whether it is a stream that says something right now."""
        return self.kind == "stream" and not self.outcome and self.said[-1:] > [time.monotonic() - TALKING]

    def run(self, cluster: Cluster, until: float) -> None:
        """Have the job done and follow it to its end, or give up at `until` (monotonic)."""
        while not self.outcome and time.monotonic() < until:
            time.sleep(self._turn(cluster))

    def _turn(self, cluster: Cluster) -> float:
        """One request; returns how many seconds to wait before the next."""
        connection = http.client.HTTPConnection(cluster.host, cluster.port, timeout=SILENCE)
        try:
            connection.connect()
        except OSError:
            self.refused += not self.job
            return AGAIN
        try:
            method, path, body, headers = self._request()
            self.resumed += bool(self.job)
            connection.request(method, path, body, {**cluster.headers(), **headers})
            return self._take(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError):
            self._broke()
            return AGAIN
        finally:
            connection.close()

    def _broke(self) -> None:
        if not self.job:  # nobody said whether it was accepted
            self.unheard += 1
            self.kind = "background" if self.kind == "whole" else self.kind

    def _request(self) -> tuple[str, str, str | None, dict[str, str]]:
        if self.job and self.kind == "stream":
            return "GET", f"/api/jobs/{self.job}/stream", None, {"Last-Event-ID": self.last_id} if self.last_id else {}
        if self.job:
            return "GET", f"/api/jobs/{self.job}/result", None, {}
        order = f"[[echo tokens={self.tokens} delay_ms={self.delay_ms:g}]]"
        body = {"model": "echo", "messages": [{"role": "user", "content": order}], "stream": self.kind == "stream"}
        wish = {"stream": {"X-LocalAI-Resumable": "1"}, "background": {"X-LocalAI-Background": "1"}}
        return "POST", "/v1/chat/completions", json.dumps(body), wish.get(self.kind, {})

    def _take(self, answer: http.client.HTTPResponse) -> float:
        if answer.status in REFUSALS:
            self.refused += not self.job
            answer.read()
            return float(answer.getheader("Retry-After") or AGAIN)
        if answer.status >= http.client.BAD_REQUEST:
            self._fail(json.loads(answer.read())["error"]["message"])
            return 0.0
        self.job = self.job or answer.getheader("X-LocalAI-Job") or ""
        if "text/event-stream" in (answer.getheader("Content-Type") or ""):
            self._follow(answer)
            return 0.0 if self.outcome else AGAIN
        said = json.loads(answer.read())
        if answer.status == http.client.OK:
            self.text, self.outcome = said["choices"][0]["message"]["content"], "done"
        return 0.0

    def _follow(self, answer: http.client.HTTPResponse) -> None:
        event_id = ""
        for line in answer:
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                self.out_of_order |= _place(value) <= _place(self.last_id)
                event_id = value
            elif name == "data" and value == "[DONE]":
                self.outcome = "done"
            elif name == "data":
                self._note(json.loads(value))
                self.last_id = event_id or self.last_id

    def _note(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self._fail(event["error"]["message"])
            return
        piece = (event.get("choices") or [{}])[0].get("delta", {}).get("content")
        if piece:
            self.text += piece
            self.said.append(time.monotonic())

    def _fail(self, message: str) -> None:
        self.outcome, self.reason = "failed", anonymous(message)


def anonymous(message: str) -> str:
    """A message without the names and numbers that tell it from its like."""
    return re.sub(r"'[^']*'|[0-9]+", "…", message)


def _place(event_id: str) -> int:
    """The index in a journal; indexes run on across attempts."""
    return int(event_id.rpartition("-")[2] or 0)
