"""A model in several files, from what is said of it to what lies on a node: added, fetched, given on, imported, removed."""

import hashlib
import os
import re
import threading
import time
from pathlib import Path

import pytest
from cluster_data import add_model, model_named, node_named
from file_server import FileServer, Remote
from gguf_files import gguf, split, split_into
from test_children import Node as Machine
from test_children import echo
from test_children import node as machine
from test_model_jobs import asking, everything, holding_for, identity, node, result, submit, url, worker
from test_models_service import files, upload
from waiting import LIMIT, wait_for

from localai_q.cluster.events import Progress
from localai_q.cluster.models import Document
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import InvalidValue
from localai_q.services import cleaning, jobs, keys, models, nodes, replicas
from localai_q.services.wiring import Services
from localai_q.store import models as model_rows
from workers.child import ModelSpec, ReplicaSpec
from workers.node import fetcher
from workers.node.fetcher import Wanted, fetch
from workers.node.jobs import Jobs
from workers.node.store import Store

__all__ = ["echo", "identity", "machine", "node", "url", "worker"]

WHOLE = gguf()
PARTS = split(WHOLE, 3)
DIGESTS = [hashlib.sha256(part).hexdigest() for part in PARTS]
NAME = "/big-0000{}-of-00003.gguf"
HUB = "huggingface://o/r/big-0000{}-of-00003.gguf"


def described(**changes: object) -> dict:
    """A model of these parts behind a web server, with what has to be said of it."""
    return {"backend": "xllamacpp", "source": "https://host" + NAME.format(1), "sha256": DIGESTS[0],
            "parts": [{"sha256": digest} for digest in DIGESTS[1:]], **changes}  # fmt: skip


# --- what the API makes of it


@pytest.mark.parametrize(("given", "says", "field"), [
    ({"parts": ()}, "big-00002-of-00003.gguf needs its SHA-256", "sha256"),
    ({"parts": [{"sha256": DIGESTS[1]}, {}]}, "big-00003-of-00003.gguf needs its SHA-256", "sha256"),
    ({"source": HUB.format(2), "parts": ()}, "name the first of them, huggingface://o/r/big-00001-of-00003.gguf", "source"),
    ({"source": "hf://o/r/x-00001-of-00300.gguf", "parts": ()}, "is one of 300 files of a model, and it can have 256", "source"),
    ({"mirrors": ["https://other" + NAME.format(3)]}, "name the first of them, https://other/big-00001", "mirrors"),
    ({"mirrors": ["https://other/big"]}, "must be that of the first, and be called like it", "mirrors"),
    ({"mirrors": ["https://other/x-00001-of-00300.gguf"]}, "is one of 300 files of a model, and it can have 256", "mirrors"),
    ({"draft_model": {"source": HUB.format(1)}}, "only a model's own can be in several", "draft_model"),
    ({"mmproj": {"source": HUB.format(2)}}, "only a model's own can be in several", "mmproj"),
    ({"loras": [{"source": HUB.format(1)}]}, "only a model's own can be in several", "loras"),
])  # fmt: skip
def test_what_is_said_wrongly_of_them_is_refused(services: Services, given: dict, says: str, field: str) -> None:
    with pytest.raises(InvalidValue, match=says) as caught:
        add_model(services, **described(**given))
    assert caught.value.param == field
    add_model(services, **described(mirrors=["https://other" + NAME.format(1)]))


def test_uploaded_ones_are_read_together_and_kept_together(services: Services) -> None:
    for content, digest in zip(PARTS[:2], DIGESTS, strict=False):
        upload(services, content, digest)
    first, *others = [{"source": f"store:{digest}", "sha256": digest} for digest in DIGESTS]
    config = {"backend": "xllamacpp", **first, "parts": others}
    with pytest.raises(InvalidValue, match=f"{DIGESTS[2]} has not been uploaded"):
        add_model(services, **config)
    upload(services, PARTS[2], DIGESTS[2])
    with pytest.raises(InvalidValue, match="file 2 of 3 says that it is file 3"):
        add_model(services, **{**config, "parts": others[::-1]})
    with pytest.raises(InvalidValue, match="one of 3, and the others are missing"):
        add_model(services, **{**config, "parts": ()})
    add_model(services, **config)
    facts = model_named(services, "m").facts
    assert (facts.layer_bytes, facts.file_size) == (1280, sum(map(len, PARTS)))
    upload(services, WHOLE, whole := hashlib.sha256(WHOLE).hexdigest())
    models.edit(services, "m", {"source": f"store:{whole}", "sha256": whole})
    assert (model_named(services, "m").config.parts, files(services)) == ((), [whole])
    assert model_named(services, "m").facts.file_size == len(WHOLE)


def test_what_a_node_learnt_of_them_stays_when_the_model_is_written_down_anew(services: Services) -> None:
    document = Document(name="m", backend="xllamacpp", source=HUB.format(1))
    models.put(services, document)
    known = model_named(services, "m")
    told = replicas.fetch_request(known)
    assert (told["parts"], [file["source"] for file in told["further"]]) == (2, [HUB.format(2), HUB.format(3)])
    with services.db.transaction() as db:
        model_rows.learn_contents(db, known, [{"sha256": digest, "size": 9} for digest in DIGESTS])
    shown, _ = models.put(services, document)
    assert (shown["revision"], shown["sha256"]) == (1, DIGESTS[0])
    assert [(part["sha256"], part["size"]) for part in shown["parts"]] == [(digest, 9) for digest in DIGESTS[1:]]


# --- what a node does


def serve_parts(server: FileServer, changes: dict[int, Remote | None] | None = None) -> list[dict]:
    """Have the server have the parts, or something else instead of some; what a job is asked for."""
    for number, content in enumerate(PARTS, 1):
        server.put(NAME.format(number), Remote(content))
    for number, remote in (changes or {}).items():
        if remote is None:
            del server.files[NAME.format(number)]
        else:
            server.put(NAME.format(number), remote)
    return [{"source": server.url + NAME.format(number), "sha256": digest}
            for number, digest in enumerate(DIGESTS, 1)]  # fmt: skip


def fetching(services: Services, node: Node, first: dict, *others: dict, parts: int = 2) -> str:
    return submit(services, node, "fetch_model", **first, parts=parts, further=list(others))


def blobs(home: Path) -> set[str]:
    return {name for name in everything(home) if not name.startswith(".")}


def test_they_are_fetched_and_told_as_one_given_to_another_node_and_go_together(
    services: Services, node: Node, worker: Jobs, url: str, server: FileServer, tmp_path: Path
) -> None:
    wanted = serve_parts(server)
    job_id = fetching(services, node, *wanted)
    worker.run(job_id)
    state, told = result(services, job_id)
    assert (state, told["sha256"], told["facts"]["layer_bytes"]) == (JobState.DONE, DIGESTS[0], 1280)
    assert [file["sha256"] for file in told["further"]] == DIGESTS[1:]
    again = fetching(services, node, *wanted)
    worker.run(again)
    assert result(services, again) == (JobState.DONE, told)

    first, *others = wanted
    add_model(services, **first, parts=others, memory=1000)
    nodes.heartbeat(services, node, hardware={"files": sorted(DIGESTS)})
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == []
    asker = asking(services, url, tmp_path, "m")
    server.files.clear()
    with holding_for(services, node, tmp_path):
        for each, content in zip(wanted, PARTS, strict=True):
            assert fetch(Wanted(**each), tmp_path / "mine", asker, lambda _: None).read_bytes() == content
    models.remove(services, "m")
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == sorted(DIGESTS)


@pytest.mark.parametrize(("changes", "says"), [
    ({3: None}, "big-00003-of-00003.gguf: .*404"),
    ({2: Remote(PARTS[1][:-1] + b"x")}, f"big-00002-of-00003.gguf: .*expected {DIGESTS[1]}"),
])  # fmt: skip
def test_one_that_is_missing_or_damaged_is_named_and_the_others_stay_for_the_next_try(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path, changes: dict, says: str
) -> None:
    wanted = serve_parts(server, changes)
    job_id = fetching(services, node, *wanted)
    worker.run(job_id)
    state, error = result(services, job_id)
    assert (state, bool(re.search(says, error["message"]))) == (JobState.FAILED, True), error
    serve_parts(server)
    seen = len(server.seen)
    again = fetching(services, node, *wanted)
    worker.run(again)
    assert result(services, again)[0] is JobState.DONE
    assert NAME.format(1) not in [asked.path for asked in server.seen[seen:]]
    assert blobs(tmp_path) == set(DIGESTS)


def test_those_of_different_models_are_refused_each_time_before_an_engine_sees_them(
    services: Services, node: Node, worker: Jobs, server: FileServer
) -> None:
    other = split(gguf(tensors={"a": 32, "b": 32, "c": 32, "d": 32, "e": 32}), 3)[1]
    first, _, last = serve_parts(server, {2: Remote(other)})
    wrong = {"source": server.url + NAME.format(2), "sha256": hashlib.sha256(other).hexdigest()}
    for _ in range(2):
        job_id = fetching(services, node, first, wrong, last)
        worker.run(job_id)
        state, error = result(services, job_id)
        assert (state, error["error"]) == (JobState.FAILED, "InvalidValue")
        assert "These are not the files of one model" in error["message"]


def of_a_hub(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What a job is asked for, of which only a hub tells what it is."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for number, (content, digest) in enumerate(zip(PARTS, DIGESTS, strict=True), 1):
        headers = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        server.put(f"/o/r/resolve/main{NAME.format(number)}", Remote(content, headers=headers))
    return [{"source": HUB.format(number)} for number in (1, 2, 3)]


def test_what_only_a_hub_tells_of_them_is_asked_before_the_first_comes(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = of_a_hub(server, monkeypatch)
    last = server.files.pop(f"/o/r/resolve/main{NAME.format(3)}")
    job_id = fetching(services, node, *wanted)
    worker.run(job_id)
    assert f"cannot fetch {HUB.format(3)}" in result(services, job_id)[1]["message"]
    server.put(f"/o/r/resolve/main{NAME.format(3)}", last)
    monkeypatch.setenv("LOCALAI_Q_DISK_SPARE", str(1 << 50))
    job_id = fetching(services, node, *wanted)
    worker.run(job_id)
    assert "big-00001-of-00003.gguf and what belongs to it: it needs 1 MiB" in result(services, job_id)[1]["message"]
    assert (server.ranges(), blobs(tmp_path)) == ([], set())
    monkeypatch.setenv("LOCALAI_Q_DISK_SPARE", "0")
    job_id = fetching(services, node, *wanted)
    worker.run(job_id)
    state, told = result(services, job_id)
    assert (state, [told["sha256"], *(file["sha256"] for file in told["further"])]) == (JobState.DONE, DIGESTS)


def test_a_fetch_of_them_that_is_cancelled_leaves_nothing_on_its_way(
    services: Services, node: Node, worker: Jobs, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = of_a_hub(server, monkeypatch)
    slow = server.files[f"/o/r/resolve/main{NAME.format(2)}"]
    slow.pause, slow.block = 0.5, 64
    job_id = fetching(services, node, *wanted)
    working = threading.Thread(target=worker.run, args=(job_id,))
    working.start()
    part = tmp_path / "models" / "blobs" / f".{DIGESTS[1]}.part"
    assert wait_for(part.exists)
    _, admin = keys.create(services, name="a", role="admin")
    jobs.cancel(services, job_id, keys.Authenticator(services).authenticate(f"Bearer {admin}"))
    working.join(LIMIT)
    assert result(services, job_id)[0] is JobState.CANCELLED
    assert blobs(tmp_path) == {DIGESTS[0]}, "what is whole stays until it is cleaned"
    assert not [name for name in everything(tmp_path) if "part" in name]


def test_those_that_have_come_count_as_needed_until_the_last_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which no model may name before, for only their source has told what they are."""
    store, told = Store(tmp_path), []
    store.folder.mkdir()
    came = store.folder / DIGESTS[0]
    came.touch()
    used = store.folder / f".{DIGESTS[0]}.used"
    used.touch()
    long_ago = time.time() - 3600
    os.utime(used, (long_ago, long_ago))
    tell = fetcher._telling(lambda progress, _: told.append(progress), [came], 3, store)
    progress = Progress(stage="downloading", done=1.0, note="from n2")
    tell(progress)
    assert used.stat().st_mtime == pytest.approx(long_ago, abs=1)
    monkeypatch.setattr(fetcher, "NEEDED", -1.0)
    tell(progress)
    assert used.stat().st_mtime > long_ago + 1
    assert {said.note for said in told} == {"file 2 of 3, from n2"}


def test_those_of_a_folder_are_imported_as_one(
    services: Services, node: Node, worker: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "shelf").mkdir()
    paths = split_into(folder, WHOLE, 3)
    monkeypatch.setenv("LOCALAI_Q_IMPORT_FOLDERS", str(folder))
    bringing = submit(services, node, "import_files", files=[str(paths[0]), str(paths[1])])
    worker.run(bringing)
    first, second = result(services, bringing)[1]["files"]
    assert (first["sha256"], first["facts"]["layer_bytes"], first["refused"]) == (DIGESTS[0], 1280, None)
    assert [file["sha256"] for file in first["further"]] == DIGESTS[1:]
    assert f"name the first of them, {paths[0]}" in second["refused"]
    assert blobs(tmp_path) == set(DIGESTS)


# --- what a replica loads


def in_several(machine: Machine, **options: object) -> ReplicaSpec:
    """A replica of a model whose three files lie on the machine."""
    (machine.home / "blobs").mkdir()
    for digest, content in zip(DIGESTS, PARTS, strict=True):
        (machine.home / "blobs" / digest).write_bytes(content)
    replica_id = machine.submit()
    model = ModelSpec(id="m", name="m", revision=1, **described(backend="echo", **options))
    return ReplicaSpec(id=replica_id, number=1, job=replica_id, model=model, backend_folder=machine._echo, blobs=machine.home / "blobs",
                       socket=machine.home / "run" / f"{replica_id}.sock", log=machine.home / "logs" / "b.log")  # fmt: skip


def test_they_lie_beside_each_other_while_they_are_loaded_and_no_longer(machine: Machine) -> None:
    replica = in_several(machine, options=("load_work_ms:3000",))
    machine.children.start_replica(machine.spec(replica))
    assert wait_for(lambda: len(list(machine.home.glob("run/*.gguf"))) == 3)
    found = sorted(machine.home.glob("run/*.gguf"))
    assert [path.name.partition("-")[2] for path in found] == [NAME.format(number)[5:] for number in (1, 2, 3)]
    assert replica.model_file == found[0]
    machine.hears(replica.id, "ready")
    assert machine.left("run", replica.id) == [f"{replica.id}.sock"]


def test_of_a_replica_that_is_killed_while_it_loads_nothing_is_left(machine: Machine) -> None:
    replica = in_several(machine, options=("load_ms:100000",))
    machine.children.start_replica(machine.spec(replica))
    assert wait_for(lambda: list(machine.home.glob("run/*-00003-of-00003.gguf")))
    machine.process(replica.id).kill()
    machine.hears(replica.id, "failed")
    assert machine.left("run", replica.id) == []
