"""A node is killed in the middle of each stage of a quantization: nothing of it runs on, and the next attempt uses what is whole.

The node's process and its children are real; its backend has a quantizer that stands still where the test wants it to.
"""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_data import api_over_http, join, ready_node
from e2e_cluster import processes_of
from file_server import FileServer, Remote
from gguf_files import gguf
from test_quantizations_service import ABLE, end, files, shown
from waiting import LIMIT, wait_for

from localai_q.bus import journal
from localai_q.cluster import quantizing
from localai_q.cluster.events import Progress
from localai_q.cluster.quantizing import Order
from localai_q.processes import kill_group
from localai_q.services import jobs, quantizations, uploads
from localai_q.services.wiring import Services
from workers import versions
from workers.child import ChildSpec
from workers.identity import Identity

CONTENT = gguf() + bytes(4 << 20)
SHA = hashlib.sha256(CONTENT).hexdigest()
QUANTIZER = """
import json, pathlib, sys, time
order, folder = json.loads(sys.stdin.readline()), pathlib.Path(%r)
with (folder / "runs").open("a") as runs:
    runs.write("x")
for stage in ("quantizing", "reading with the source", "reading with the result"):
    if stage == "quantizing":
        pathlib.Path(order["result"]).write_bytes(pathlib.Path(order["source"]).read_bytes())
    print(json.dumps({"progress": {"stage": stage, "done": 1, "total": 2, "unit": "tokens"}}), flush=True)
    while (folder / stage).exists():
        time.sleep(0.01)
figures = dict.fromkeys(("perplexity", "bits_per_weight", "source_perplexity", "source_bits_per_weight", "kl_divergence"), 1.0)
print(json.dumps({"result": {**figures, "tokens": 256}}), flush=True)
"""
NODE = """
import sys
from pathlib import Path
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.jobs import Jobs
spec = ChildSpec.model_validate_json(Path(sys.argv[1]).read_text())
Jobs(spec, Identity(spec.identity), Path(sys.argv[1]).parent / "run").run(sys.argv[2])
"""


class Machine:
    """A node whose process is started for each job."""

    def __init__(self, services: Services, url: str, home: Path) -> None:
        self.services, self.home, self.identity = services, home, Identity(home / "identity.json")
        self.node = ready_node(services, secret=self.identity.secret())
        backend = home / "backends" / "able" / "v1"
        (backend / "venv" / "bin").mkdir(parents=True)
        (backend / "venv" / "bin" / "python").symlink_to(sys.executable)
        (backend / "quantize.py").write_text(QUANTIZER % str(home))
        versions.switch(home / "backends", "able", "v1")
        spec = ChildSpec(
            node_id=self.node.id, node_name="n1", redis_url=services.settings.redis_url, lease=30.0, journal_ttl=60.0,
            journal_max=1000, load_stall=60.0, status_fd=-1, backends=home / "backends", models=home / "models",
            api_url=url, identity=self.identity.path,
        )  # fmt: skip
        (home / "spec.json").write_text(spec.model_dump_json())

    def begin(self, made: str) -> str:
        """Have the file made, by a process of its own; the job's id."""
        shown(self.services, made)
        end(self.services, made, self.node)  # the backend is there
        job_id = shown(self.services, made)["job"]
        environment = {**os.environ, "LOCALAI_Q_HOME": str(self.home), "LOCALAI_Q_DISK_SPARE": "0",
                       "LOCALAI_Q_ALLOW_PRIVATE_SOURCES": "true"}  # fmt: skip
        command = [sys.executable, "-c", NODE, str(self.home / "spec.json"), job_id]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        return job_id

    def die(self) -> None:
        """Be killed, and come back."""
        self.process.kill()
        self.process.wait()
        assert wait_for(lambda: not processes_of(self.home))
        join(self.services, "n1", secret=self.identity.secret())

    def left(self) -> list[str]:
        return [path.name for path in (self.home / "models" / "blobs").iterdir() if "part" in path.name]


@pytest.fixture
def services(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Services with a backend that can quantize."""
    monkeypatch.setattr(quantizing, "FIRST_PAUSE", 0.0)
    (tmp_path / "gallery.yaml").write_text(ABLE)
    settings = services.settings.model_copy(update={"backend_galleries": str(tmp_path / "gallery.yaml")})
    return replace(services, settings=settings)


@pytest.fixture
def machine(services: Services, tmp_path: Path) -> Iterator[Machine]:
    with api_over_http(services) as url:
        found = Machine(services, url, tmp_path / "node")
        yield found
        kill_group(found.process)


def is_at(services: Services, job_id: str, stage: str) -> bool:
    event = journal.latest(services.redis, [job_id]).get(job_id)
    return isinstance(event, Progress) and event.stage == stage


@pytest.mark.parametrize(
    ("stage", "runs"),
    [("downloading", 1), ("quantizing", 2), ("reading with the source", 2), ("reading with the result", 2), ("uploading", 1)],
)  # fmt: skip
def test_whatever_its_node_dies_of_it_is_made(
    services: Services, machine: Machine, server: FileServer, stage: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, pause=0.05 if stage == "downloading" else 0.0))
    made = quantizations.create(services, Order(model=url, sha256=SHA, backend="able", quantization_type="q8_0"))["id"]
    with ExitStack() as stack:
        hold(machine, stage, stack, monkeypatch)
        job_id = machine.begin(made)
        assert wait_for(lambda: is_at(services, job_id, stage)), stage
        machine.die()
    server.files["/m.gguf"].pause = 0.0
    assert "was started anew" in shown(services, made)["failures"][0]["reason"]
    machine.begin(made)
    assert machine.process.wait(LIMIT) == 0
    jobs.apply_ends(services)
    one = shown(services, made)
    assert (one["status"], one["result"]["sha256"], len(one["failures"])) == ("completed", SHA, 1), one
    assert files(services) == [SHA]
    assert machine.left() == []
    assert len((machine.home / "runs").read_text()) == runs
    if stage == "downloading":
        assert server.ranges()[-1].startswith("bytes="), "what had come was not fetched again"


def hold(machine: Machine, stage: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a stage stand still until the stack is left."""
    if stage == "uploading":  # the API has the file, and does not say so
        go_on, receive = threading.Event(), uploads.receive

        def late(*given: Any) -> uploads.Received:
            received = receive(*given)
            assert given[-1].start is None or go_on.wait(LIMIT)
            return received

        monkeypatch.setattr(uploads, "receive", late)
        stack.callback(go_on.set)
    elif stage != "downloading":
        (machine.home / stage).touch()
        stack.callback((machine.home / stage).unlink)
