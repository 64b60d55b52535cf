"""A node speaks to its API itself, whatever proxy its environment names, and refuses a name before it writes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from workers.identity import Identity
from workers.node.api import NodeApi, register


class Answering(BaseHTTPRequestHandler):
    """An API that says yes to everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"redis_url": "redis://x", "stop": []}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(20)
def test_a_proxy_of_the_environment_is_not_asked(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    answer = register(f"{url}/", "token", "alpha", Identity(tmp_path / "identity.json"), {})
    assert answer["redis_url"] == "redis://x"
    assert NodeApi(url, "n1", Identity(tmp_path / "identity.json")).heartbeat({}, [])["stop"] == []


@pytest.mark.parametrize("name", ["../../evil", ".hidden", "a/b", "a b", "x" * 64])
def test_a_name_that_is_no_name_ends_the_node_before_it_writes_anything(tmp_path: Path, name: str) -> None:
    home = tmp_path / "deep" / "er" / "home"
    home.mkdir(parents=True)
    settings = {"LOCALAI_REGISTER_TO": "http://127.0.0.1:9", "LOCALAI_REGISTRATION_TOKEN": "x"}
    done = subprocess.run(
        [Path(sys.executable).with_name("celery"), "-A", "localai_q", "worker"],
        env={**os.environ, **settings, "LOCALAI_Q_HOME": str(home), "LOCALAI_NODE_NAME": name},
        capture_output=True, text=True, timeout=30, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "set LOCALAI_NODE_NAME" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
