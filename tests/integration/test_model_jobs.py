"""Fetching and cleaning as a node does them: jobs in processes of their own, which a cancellation ends without a trace."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_data import add_model, api_over_http, model_named, ready_node
from file_server import FileServer, Remote
from gguf_files import gguf
from holding import Running, holder
from waiting import LIMIT, wait_for

from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.config import load_settings
from localai_q.errors import Cancelled, Paused, to_record
from localai_q.services import jobs, keys, nodes, replicas, retries
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.api import NodeApi
from workers.node.fetcher import Wanted, fetch
from workers.node.jobs import Jobs
from workers.node.sources import Access

CONTENT = os.urandom(2 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path / "identity.json")


@pytest.fixture
def node(services: Services, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setenv("LOCALAI_Q_ALLOW_PRIVATE_SOURCES", "true")
    return ready_node(services, secret=identity.secret())


@pytest.fixture
def url(services: Services) -> Iterator[str]:
    with api_over_http(services) as found:
        yield found


@pytest.fixture
def worker(services: Services, node: Node, url: str, identity: Identity, tmp_path: Path) -> Jobs:
    spec = ChildSpec(
        node_id=node.id, node_name=node.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
        journal_max=1000, load_stall=60.0, status_fd=-1, backends=tmp_path / "backends", models=tmp_path / "models",
        api_url=url, identity=identity.path,
    )  # fmt: skip
    return Jobs(spec, identity, tmp_path / "run")


def submit(services: Services, node: Node, kind: str, **request: object) -> str:
    request = {"kind": kind, **request}
    return jobs.submit_node_job(services, kind=kind, node_id=node.id, model_id=None, request=request)


def result(services: Services, job_id: str) -> tuple[JobState, dict]:
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    return found.state, found.result or found.error


def everything(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "models" / "blobs").iterdir())


def test_a_file_is_fetched_described_and_removed(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path
) -> None:
    url = server.put("/m", Remote(CONTENT))
    job_id = submit(services, node, "fetch_model", source=server.url + "/gone", mirrors=[url], sha256=DIGEST, size=0)
    worker.run(job_id)
    told = {"sha256": DIGEST, "size": len(CONTENT), "facts": None, "further": []}
    assert result(services, job_id) == (JobState.DONE, told)
    again = submit(services, node, "fetch_model", source=url, sha256=DIGEST)
    worker.run(again)
    assert result(services, again)[0] is JobState.DONE
    assert len(server.seen) == 2
    nodes.heartbeat(services, node, hardware={"files": [DIGEST]})
    then = time.time() - 10
    os.utime(tmp_path / "models" / "blobs" / f".{DIGEST}.used", (then, then))
    cleaning = submit(services, node, "clean_models", grace=0.0, floor=0, dry_run=False)
    worker.run(cleaning)
    state, told = result(services, cleaning)
    assert (state, told["freed"], told["kept"]) == (JobState.DONE, len(CONTENT), [])
    assert everything(tmp_path) == []


def test_further_files_come_with_the_models_own_and_go_when_one_is_not_to_be_had(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path
) -> None:
    other = os.urandom(1000)
    digest = hashlib.sha256(other).hexdigest()
    wanted = {"source": server.put("/m", Remote(CONTENT)), "sha256": DIGEST}
    further = {"source": server.put("/x", Remote(other)), "sha256": digest, "size": 0}
    first = submit(services, node, "fetch_model", **wanted, further=[further])
    worker.run(first)
    told = {"sha256": DIGEST, "size": len(CONTENT), "facts": None, "further": [{"sha256": digest, "size": 1000}]}
    assert result(services, first) == (JobState.DONE, told)
    seen = len(server.seen)
    again = submit(services, node, "fetch_model", **wanted, further=[further])
    worker.run(again)
    assert (result(services, again), len(server.seen)) == ((JobState.DONE, told), seen)
    wrong = submit(services, node, "fetch_model", **wanted, further=[further, {**further, "sha256": "f" * 64}])
    worker.run(wrong)
    state, error = result(services, wrong)
    assert (state, "f" * 64 in error["message"]) == (JobState.FAILED, True)
    assert {name for name in everything(tmp_path) if not name.startswith(".")} == {DIGEST, digest}


def test_what_the_network_policy_refuses_reaches_the_job(
    services: Services, node: Node, worker: Jobs, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCALAI_Q_ALLOW_PRIVATE_SOURCES")
    job_id = submit(services, node, "fetch_model", source=server.put("/m", Remote(CONTENT)), sha256=DIGEST)
    worker.run(job_id)
    state, error = result(services, job_id)
    assert (state, error["error"]) == (JobState.FAILED, "InvalidValue")
    assert "an address of this cluster" in error["message"]
    assert server.seen == []


@pytest.mark.parametrize("how", ["cancelled", "given back", "paused"])
def test_a_cancelled_fetch_leaves_nothing_and_one_that_is_given_back_or_paused_goes_on(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path, how: str
) -> None:
    url = server.put("/m", Remote(CONTENT, pause=0.3))
    job_id = submit(services, node, "fetch_model", source=url, sha256=DIGEST, size=len(CONTENT))
    working = threading.Thread(target=worker.run, args=(job_id,))
    working.start()
    part = tmp_path / "models" / "blobs" / f".{DIGEST}.part"
    assert wait_for(lambda: part.exists() and part.stat().st_size)
    _, admin = keys.create(services, name="a", role="admin")
    asker = keys.Authenticator(services).authenticate(f"Bearer {admin}")
    if how == "cancelled":
        assert jobs.cancel(services, job_id, asker) == "cancelling"
    elif how == "paused":
        jobs.pause(services, job_id, asker)
    else:
        worker.claims.cancel_all("drain")
    working.join(LIMIT)
    assert not working.is_alive()
    if how == "cancelled":
        assert result(services, job_id) == (JobState.CANCELLED, to_record(Cancelled()))
        assert everything(tmp_path) == []
        return
    if how == "paused":
        assert result(services, job_id) == (JobState.CANCELLED, to_record(Paused()))
        job_id = retries.retry(services, job_id, asker)
    server.put("/m", Remote(CONTENT))
    worker.run(job_id)
    assert result(services, job_id)[0] is JobState.DONE
    assert server.ranges()[1].startswith("bytes=")


@contextmanager
def holding_for(services: Services, node: Node, tmp_path: Path) -> Iterator[Running]:
    """The node gives its files to others, and has said which it has."""
    shutil.copy(tmp_path / "identity.json", tmp_path / "models" / "identity.json")
    with holder(tmp_path / "models", node.id) as running:
        told = {"files": running.store.files(), "files_address": running.address}
        nodes.heartbeat(services, node, hardware=told)
        yield running


def asking(services: Services, url: str, tmp_path: Path, model: str) -> Access:
    """Another node, which is to run a model."""
    identity = Identity(tmp_path / "other.json")
    node = ready_node(services, "n2", identity.secret())
    nodes.heartbeat(services, node, hardware={"ram_total": 10**9, "ram_available": 10**9, "files": []})
    replicas.place(services, model_named(services, model), node.id)
    cfg = load_settings(allow_private_sources=True, disk_spare=0)
    return Access(cfg, url, node.id, identity.secret(), peers=NodeApi(url, node.id, identity))


def test_a_holder_that_gave_a_wrong_byte_mends_itself(
    services: Services, node: Node, worker: Jobs, url: str, server: FileServer, tmp_path: Path
) -> None:
    origin = server.put("/m", Remote(CONTENT))
    job_id = submit(services, node, "fetch_model", source=origin, sha256=DIGEST)
    worker.run(job_id)
    assert result(services, job_id)[0] is JobState.DONE
    add_model(services, source=origin, sha256=DIGEST, size=len(CONTENT), memory=1000)
    asker = asking(services, url, tmp_path, "m")
    blob = tmp_path / "models" / "blobs" / DIGEST
    with blob.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with holding_for(services, node, tmp_path):
        wanted = Wanted(source=origin, sha256=DIGEST)
        assert fetch(wanted, tmp_path / "mine", asker, lambda _: None).read_bytes() == CONTENT
    assert len(server.seen) == 2
    (check,) = jobs.listed(services, states=["open"], kinds=["check_file"], limit=9)
    assert (check["node"], check["subject"]) == ("n1", DIGEST)
    worker.run(check["id"])
    state, told = result(services, check["id"])
    assert (state, told["removed"]) == (JobState.DONE, True)
    assert told["found"] not in (None, DIGEST)
    assert not blob.exists()
    again = submit(services, node, "fetch_model", source=origin, sha256=DIGEST)
    worker.run(again)
    assert result(services, again)[0] is JobState.DONE
    assert blob.read_bytes() == CONTENT


def test_a_sound_file_stays_and_is_not_read_again_for_every_complaint(
    services: Services, node: Node, worker: Jobs, url: str, server: FileServer, tmp_path: Path
) -> None:
    origin = server.put("/m", Remote(CONTENT))
    worker.run(submit(services, node, "fetch_model", source=origin, sha256=DIGEST))
    add_model(services, source=origin, sha256=DIGEST, size=len(CONTENT), memory=1000)
    asker = asking(services, url, tmp_path, "m")
    beginnings = tmp_path / "models" / "blobs" / f".{DIGEST}.beginnings"
    beginnings.write_bytes(b"x" * 32)

    def checks() -> list[str]:
        asker.peers.blame(DIGEST, node.id)
        return [job["id"] for job in jobs.listed(services, states=["open"], kinds=["check_file"], limit=9)]

    (check,) = checks()
    assert checks() == [check]
    worker.run(check)
    assert result(services, check) == (JobState.DONE, {"sha256": DIGEST, "found": DIGEST, "removed": False})
    assert beginnings.read_bytes() == b""
    assert checks() == []
    gone = submit(services, node, "check_file", sha256="0" * 64)
    worker.run(gone)
    assert result(services, gone)[1] == {"sha256": "0" * 64, "found": None, "removed": False}


def test_files_of_a_folder_are_listed_imported_and_given_to_other_nodes(
    services: Services, node: Node, worker: Jobs, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, content = tmp_path / "shelf", gguf()
    sha256 = hashlib.sha256(content).hexdigest()
    folder.mkdir()
    good, cut = folder / "good.gguf", folder / "cut.gguf"
    good.write_bytes(content)
    cut.write_bytes(content[:99])
    (tmp_path / "secret.gguf").write_bytes(content)
    refused = submit(services, node, "scan_files", folder=str(folder))
    worker.run(refused)
    assert result(services, refused)[1]["error"] == "Forbidden"
    monkeypatch.setenv("LOCALAI_Q_IMPORT_FOLDERS", str(folder))
    listing = submit(services, node, "scan_files", folder="")
    worker.run(listing)
    told = result(services, listing)[1]
    assert told["folders"] == [str(folder), str(tmp_path / "models")]
    assert [(file["path"], bool(file["refused"])) for file in told["files"]] == [(str(cut), True), (str(good), False)]
    paths = [str(path) for path in (good, cut, tmp_path / "secret.gguf", good)]
    bringing = submit(services, node, "import_files", files=paths)
    worker.run(bringing)
    state, told = result(services, bringing)
    assert state is JobState.DONE
    first, damaged, outside, again = told["files"]
    assert (first["sha256"], first["size"], first["facts"]["architecture"]) == (sha256, len(content), "llama")
    assert again == first
    assert "ends within its header" in damaged["refused"]
    assert "LOCALAI_Q_IMPORT_FOLDERS" in outside["refused"]
    blobs = [name for name in everything(tmp_path) if not name.startswith(".")]
    assert blobs == [sha256]

    add_model(services, source=f"file:{good}", sha256=sha256, size=len(content), memory=1000)
    asker = asking(services, url, tmp_path, "m")
    good.unlink()  # the other node has no such file, and need not have it
    with holding_for(services, node, tmp_path):
        wanted = Wanted(source=f"file:{good}", sha256=sha256, size=len(content))
        assert fetch(wanted, tmp_path / "mine", asker, lambda _: None).read_bytes() == content
