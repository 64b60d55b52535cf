"""A stage of a load that stands still is ended with the reason; one that moves, however slowly, goes on."""

import hashlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster_data import claim, watched
from sqlalchemy import text

from localai_q import names
from localai_q.cluster.events import End, Progress
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.services import jobs
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node import stalls
from workers.node.jobs import Jobs
from workers.node.stalls import Watch

CONTENT = os.urandom(1 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Source(http.server.ThreadingHTTPServer):
    """Sends a file and stands still in the middle of it, for so many seconds each time, so many times."""

    daemon_threads = True
    pauses = 1
    pause = 0.0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Source

    def do_GET(self) -> None:
        if "/holders/" in self.path:  # no other node has it
            answer = json.dumps({"holders": [], "stored": True}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:HALF])
        step = HALF // self.server.pauses + 1
        for start in range(HALF, len(CONTENT), step):
            time.sleep(self.server.pause)
            self.wfile.write(CONTENT[start : start + step])

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def source() -> Iterator[Source]:
    server = Source()
    yield server
    server.shutdown()


def worker(services: Services, node: Node, home: Path, source: Source) -> Jobs:
    """What does the node's jobs, with two seconds of patience."""
    spec = ChildSpec(
        node_id=node.id, node_name=node.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
        journal_max=1000, load_stall=2.0, status_fd=-1, backends=home / "backends", models=home / "models",
        api_url=f"http://127.0.0.1:{source.server_port}", identity=home / "identity.json",
    )  # fmt: skip
    return Jobs(spec, Identity(spec.identity), home / "run")


def fetch(services: Services, node: Node) -> str:
    request = {"kind": "fetch_model", "source": f"store:{DIGEST}", "sha256": DIGEST, "size": len(CONTENT), "name": "m"}
    return jobs.submit_node_job(services, kind="fetch_model", node_id=node.id, model_id=None, request=request)


def ended(services: Services, job_id: str) -> tuple[JobState, str]:
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    assert found is not None
    return found.state, str((found.error or {}).get("message", ""))


def lines_of_children() -> list[list[str]]:
    """The command lines of this process's children that run."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            found.append(child.cmdline())
    return found


def test_a_download_that_stands_still_is_ended_and_says_at_which_byte(
    services: Services, node: Node, source: Source, tmp_path: Path
) -> None:
    source.pause = 600.0
    job_id = fetch(services, node)
    worker(services, node, tmp_path, source).run(job_id)
    state, reason = ended(services, job_id)
    assert (state, reason) == (
        JobState.FAILED, f"stalled at downloading {HALF} of {len(CONTENT)} bytes: nothing moved for 3 s"
    )  # fmt: skip
    assert not [line for line in lines_of_children() if "workers.node.job_child" in line]


def test_a_download_that_is_slow_but_moves_goes_on(
    services: Services, node: Node, source: Source, tmp_path: Path
) -> None:
    source.pause, source.pauses = 0.4, 8
    job_id = fetch(services, node)
    worker(services, node, tmp_path, source).run(job_id)
    assert ended(services, job_id)[0] is JobState.DONE
    assert (tmp_path / "models" / "blobs" / DIGEST).read_bytes() == CONTENT


def test_what_no_worker_of_a_node_begins_is_ended(services: Services, node: Node) -> None:
    services = type(services)(
        services.settings.model_copy(update={"load_stall": 1.0}), *list(vars(services).values())[1:]
    )
    line, job_id = names.node_jobs_queue(node.id), fetch(services, node)
    other = jobs.submit_node_job(
        services, kind="install_backend", node_id=node.id, model_id=None, request={"kind": "install_backend"}
    )
    lease = claim(services, other, line, node.id)
    services.redis.zadd(names.waiting_key(line), {job_id: 1}, xx=True)
    with services.db.transaction() as db:
        db.execute(text("UPDATE jobs SET created_at = now() - interval '1 minute'"))
    jobs.recover(services)
    assert ended(services, job_id)[0] is JobState.OPEN, "nobody has looked for long enough"
    watched(services)
    jobs.recover(services)
    assert ended(services, job_id)[0] is JobState.OPEN, "its turn comes when the other ends"
    assert services.leases.finish(lease, 1, End(state=JobState.DONE), node_id=node.id)
    watched(services)
    jobs.recover(services)
    assert ended(services, job_id) == (JobState.FAILED, "its node has not begun it for 1 s")


def test_a_stage_that_is_busy_for_ever_is_ended_too(
    services: Services, node: Node, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "LONGEST", 3.0)
    monkeypatch.setattr(Watch, "_moved", lambda _: True)
    source.pause = 600.0
    job_id = fetch(services, node)
    worker(services, node, tmp_path, source).run(job_id)
    assert ended(services, job_id) == (
        JobState.FAILED,
        f"is busy for ever at downloading {HALF} of {len(CONTENT)} bytes: nothing was heard of its progress for 4 s",
    )


def test_who_says_how_far_it_is_may_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "LONGEST", 3.0)
    watch = Watch(0, 2.0)
    watch._moved = lambda: True
    for done in range(10):
        watch.note(Progress(stage="x", done=done))
        assert not watch.look()
        assert not watch.look()


@pytest.mark.parametrize("error", [RuntimeError("io file was empty"), FileNotFoundError(), psutil.AccessDenied(1)])
@pytest.mark.parametrize("asked", ["io_counters", "cpu_times", "children"])
def test_what_the_system_does_not_tell_of_a_process_is_no_movement(
    monkeypatch: pytest.MonkeyPatch, asked: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(psutil.Process, asked, fail)
    resting = subprocess.Popen(["sleep", "60"])
    watch = Watch(resting.pid, 2.0)
    assert [watch.look() for _ in range(4)][-1]
    resting.kill()
    resting.wait()


def test_to_say_the_same_again_is_no_progress() -> None:
    watch = Watch(0, 2.0)
    watch._moved = lambda: False
    for _ in range(2):
        watch.note(Progress(stage="x", done=1))
        assert not watch.look()
    watch.note(Progress(stage="x", done=1))
    assert watch.look()
    watch.note(Progress(stage="x", done=2))
    assert not watch.look()
