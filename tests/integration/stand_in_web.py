"""Stands in for the web process in tests of `up`: the few answers that a start waits for, over real HTTP."""

import http.server
import json
import os
import time
from pathlib import Path

HOME = Path(os.environ["LOCALAI_Q_HOME"])
HOST, PORT = os.environ["LOCALAI_ADDRESS"].rsplit(":", 1)
KEY = "lq-test-key"
STARTED = time.monotonic()
STATES = {name: "pending" for name in os.environ.get("TEST_NODES", "").split(",") if name}


def job() -> dict[str, object]:
    progress = {"stage": "downloading", "done": 512, "total": 1024, "unit": "bytes", "note": ""}
    return {"id": "j1", "kind": "fetch_model", "state": "open", "node": "n1", "model": "tiny", "progress": progress}


def answer(path: str) -> object:
    loading = time.monotonic() - STARTED < 1.0
    if path.startswith("/api/nodes"):
        return {"nodes": [{"id": f"id{name}", "name": name, "state": state} for name, state in STATES.items()]}
    if path.startswith("/api/jobs"):
        return {"jobs": [job()] if loading else []}
    replica = {"id": "r1", "node": "n1", "state": "loading" if loading else "ready", "reason": ""}
    return {"models": [{"name": "tiny", "default": True, "replicas": [replica]}]}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(200, answer(self.path))

    def do_POST(self) -> None:
        name = self.path.split("/")[3].removeprefix("id")
        STATES[name] = "ready"
        self.reply(200, {})

    def reply(self, status: int, body: object) -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status, body = 401, {"error": {}}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


assert os.environ["LOCALAI_DATABASE_URL"]
assert os.environ["LOCALAI_REDIS_URL"]
if not (HOME / "admin.key").exists():
    (HOME / "admin.key").write_text(KEY)
http.server.ThreadingHTTPServer((HOST, int(PORT)), Handler).serve_forever()
