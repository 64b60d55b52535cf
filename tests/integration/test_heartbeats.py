"""A node's heartbeat goes on whatever answers it, and ends the node only when the API itself knows it no more."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from waiting import LIMIT, wait_for

from localai_q.config import load_settings
from localai_q.errors import Forbidden
from workers.identity import Identity
from workers.node import api
from workers.node.worker import Node

OWN_403 = json.dumps(Forbidden("This is not the secret of that node.").body()).encode()
GOOD = json.dumps({"state": "ready", "stop": []}).encode()
ANSWERS = [
    (200, b"<html>a captive portal</html>"), (200, b""), (200, b"[]"), (200, b"null"), (204, b""), (302, b""), (301, GOOD),
    (403, b"<html>a proxy</html>"), (403, b'{"error": "a proxy"}'), (404, b"{}"), (500, b"x"), (502, b"\xff"),
    (200, b'{"stop": 5}'), (200, b'{"stop": [null, {}]}'), (None, b""), (-1, b""),
]  # fmt: skip


class Misanswering(BaseHTTPRequestHandler):
    """Gives one answer of `ANSWERS` after the other, then good ones, until it is told to give `last`."""

    seen: list[dict]
    last: tuple[int, bytes] = (200, GOOD)

    def do_POST(self) -> None:
        told = self.rfile.read(int(self.headers["content-length"]))
        if not self.path.endswith("/heartbeat"):
            raise AssertionError(self.path)
        place = len(self.seen)
        self.seen.append(json.loads(told))
        status, body = ANSWERS[place] if place < len(ANSWERS) else type(self).last
        if status is None:
            return  # hang up
        if status == -1:
            time.sleep(0.6)  # longer than the node waits
            return
        self.send_response(status)
        self.send_header("location", "http://127.0.0.1:9/")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Misanswering]]]:
    handler = type("Handler", (Misanswering,), {"seen": []})
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    made.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", handler
    made.shutdown()
    made.server_close()


def test_a_heartbeat_survives_every_answer_and_heeds_the_one_that_ends_it(
    server: tuple[str, type[Misanswering]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    url, handler = server
    monkeypatch.setattr(api, "TIMEOUT", httpx.Timeout(0.3))
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, signum: killed.append(signum))
    cfg = load_settings(home=tmp_path, register_to=url, registration_token="t", node_name="n1")
    node = Node(cfg, {"id": "n1", "name": "n1", "heartbeat": 0.01}, Identity(tmp_path / "identity.json"))
    beats = threading.Thread(target=node._heartbeats, daemon=True)
    beats.start()
    assert wait_for(lambda: len(handler.seen) > len(ANSWERS) + 3)
    assert killed == []
    assert all(told["hardware"]["cpus"] > 0 for told in handler.seen)
    handler.last = (403, OWN_403)
    beats.join(LIMIT)
    assert not beats.is_alive()
    assert killed == [signal.SIGTERM]
    assert [record.message for record in caplog.records if "was removed" in record.message] == [
        "this node was removed from the cluster and ends; start it again to have it ask to join anew"
    ]
    said = len(handler.seen)
    node.stop()
    assert len(handler.seen) == said, "who is not known says no goodbye"
