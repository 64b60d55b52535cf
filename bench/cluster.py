"""A cluster for a benchmark: started in a folder of its own, asked over plain sockets, looked at, ended in any case."""

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import redis

from localai_q.processes import spawn

START = 180.0  # seconds, with a first install
STOP = 20.0  # seconds that the end of a cluster may take before it is killed
ROLES = {  # words of a command line: what that process is
    "jobs@": "jobs", "-Q model.": "replica", "server.py": "backend", "valkey-server": "valkey", "postgres": "postgres",
    "gunicorn": "web", "-Q control": "control", "localai_q flower": "flower", "localai-q up": "up",
    "celery -A localai_q worker": "node", "workers.node.holder": "files",
}  # fmt: skip


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

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes by what they are, the oldest first."""
        found: dict[str, list[psutil.Process]] = {}
        for process, line in processes_of(self.home).items():
            text = " ".join(line)
            role = next((role for words, role in ROLES.items() if words in text), "other")
            found.setdefault(role, []).append(process)
        for processes in found.values():
            processes.sort(key=lambda process: process.pid)
        return found

    def state(self) -> dict[str, Any]:
        """What `up` generated: the stores' URLs among it."""
        state: dict[str, Any] = json.loads((self.home / "state.json").read_text())
        return state

    def redis(self) -> redis.Redis:
        """A client of the cluster's own Valkey."""
        return redis.Redis.from_url(self.state()["redis_url"], decode_responses=True, socket_timeout=5)

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the cluster's own database."""
        connection = psycopg2.connect(self.state()["database_url"].replace("+psycopg2", ""))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(query, values)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def add_model(self, name: str, *, replicas: int = 1, **config: Any) -> None:
        """Register a model on every node and wait until so many replicas are loaded."""
        self.call("POST", "/api/models", {"name": name, "spread_all": True, **config})
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            model = next(m for m in self.call("GET", "/api/models")["models"] if m["name"] == name)
            if [replica["state"] for replica in model["replicas"]].count("ready") >= replicas:
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


def end_on_sigterm() -> None:
    """Have a SIGTERM end this process as Ctrl-C does: with everything that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C interrupt the end of what the first one ends; that takes seconds."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(nodes: int = 1, /, **settings: str) -> Iterator[Cluster]:
    """A cluster of so many nodes, without a model. Nothing of it is left when the block ends, however that ends."""
    end_on_sigterm()
    home = Path(tempfile.mkdtemp(prefix="lqbench")).resolve()
    home.chmod(0o711)  # Postgres runs as a user of its own when this runs as root
    port = _free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("LOCALAI_")}
    env |= {"LOCALAI_Q_HOME": str(home), "LOCALAI_ADDRESS": f"127.0.0.1:{port}", "LOCALAI_NODE_NAME": "one", **settings}
    command = [str(Path(sys.executable).with_name("localai-q")), "up", "--no-model", "--nodes", str(nodes)]
    process = spawn(command, env=env, log=home / "up.log", death_signal=signal.SIGTERM)
    try:
        ready = _wait_ready(process, home)
        yield Cluster("127.0.0.1", port, ready["api_key"], home)
    finally:
        with undisturbed():
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP)
            left = list(processes_of(home))
            for each in left:
                with suppress(psutil.Error):
                    each.kill()
            psutil.wait_procs(left, 5)
            process.wait()
            shutil.rmtree(home, ignore_errors=True)


def processes_of(home: Path) -> dict[psutil.Process, list[str]]:
    """Every process that works in this home, by its settings, its command line or its folder; and that line."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            settings, line = process.environ().get("LOCALAI_Q_HOME", ""), process.cmdline()
            if any(f"{text}/".startswith(f"{home}/") for text in (settings, process.cwd(), *line)):
                found[process] = line
    return found


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
