"""A cluster for a benchmark: started in a folder of its own, asked over plain sockets, stopped at the end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = 180.0  # seconds, with a first install


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    host: str
    port: int
    key: str
    home: Path

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=120)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answer of the cluster's API."""
        connection = self.connection()
        connection.request(method, path, json.dumps(body) if body is not None else None, self.headers())
        response = connection.getresponse()
        text = response.read()
        if response.status >= http.client.BAD_REQUEST:
            raise RuntimeError(f"{method} {path}: {response.status} {text.decode()}")
        return json.loads(text or b"{}")

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

    def add_model(self, name: str, **config: Any) -> None:
        """Register a model on every node and wait until it is loaded."""
        self.call("POST", "/api/models", {"name": name, "spread_all": True, **config})
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            model = next(m for m in self.call("GET", "/api/models")["models"] if m["name"] == name)
            if any(replica["state"] == "ready" for replica in model["replicas"]):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the model {name} was not loaded within {START:.0f} s")

    def chat(self, connection: http.client.HTTPConnection, body: dict[str, Any]) -> tuple[float, int]:
        """One streamed chat over a kept connection: seconds to the first token, and the tokens of the answer."""
        started = time.perf_counter()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), self.headers())
        first, last = 0.0, b""
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - started
            last = line
        answer = json.loads(last.removeprefix(b"data: "))
        if not answer.get("usage"):
            raise RuntimeError(f"the stream ended without usage: {answer}")
        return first, int(answer["usage"]["completion_tokens"])


@contextmanager
def running(**settings: str) -> Iterator[Cluster]:
    """A cluster of one node, without a model."""
    home = Path(tempfile.mkdtemp(prefix="localai_q-bench-"))
    port = _free_port()
    env = {**os.environ, "LOCALAI_Q_HOME": str(home), "LOCALAI_ADDRESS": f"127.0.0.1:{port}", **settings}
    command = [str(Path(sys.executable).with_name("localai-q")), "up", "--no-model"]
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        ready = _wait_ready(process, home)
        yield Cluster("127.0.0.1", port, ready["api_key"], home)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        shutil.rmtree(home, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], home: Path) -> Any:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        try:
            return json.loads((home / "ready.json").read_text())
        except FileNotFoundError:
            if process.poll() is not None:
                raise RuntimeError((home / "up.log").read_text()) from None
            time.sleep(0.1)
    raise RuntimeError("the cluster did not start: " + (home / "up.log").read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
