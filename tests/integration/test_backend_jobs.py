"""Backends installed, upgraded and deleted as a node does it: jobs in processes of their own; and the API for that."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_data import web_process
from toy_backends import entry_of, pack, run_script
from waiting import LIMIT, wait_for

from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled
from localai_q.gallery.catalog import BackendEntry, backend
from localai_q.services import backends, galleries, jobs, keys, models, nodes
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from workers import versions
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.installer import install_backend, python_of
from workers.node.jobs import Jobs


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_backend(backend("echo"), tmp_path_factory.mktemp("echo"), lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "backends"


@pytest.fixture
def worker(services: Services, node: Node, root: Path, tmp_path: Path) -> Jobs:
    spec = ChildSpec(
        node_id=node.id, node_name=node.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
        journal_max=1000, load_stall=60.0, status_fd=-1, backends=root, models=tmp_path / "models",
        api_url="http://127.0.0.1:9", identity=tmp_path / "identity.json",
    )  # fmt: skip
    return Jobs(spec, Identity(spec.identity), tmp_path / "run")


@pytest.fixture
def call(services: Services) -> Callable[..., Any]:
    """An admin's request; fails on another status than `status`."""
    key = keys.create(services, name="a", role="admin")[1]

    def ask(method: str, path: str, status: int = 200, **more: Any) -> Any:
        with web_process(services.settings) as app, app.test_client() as http:
            answer = http.open(path, method=method, headers={"Authorization": f"Bearer {key}"}, **more)
        assert answer.status_code == status, answer.text
        return answer.get_json()

    return ask


def submit(services: Services, node: Node, kind: str, entry: BackendEntry) -> str:
    request = {"kind": kind, "backend": entry.name, "entry": entry.model_dump(mode="json")}
    return jobs.submit_node_job(services, kind=kind, node_id=node.id, model_id=None, request=request)


def result(services: Services, job_id: str) -> tuple[JobState, dict]:
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    return found.state, found.result or found.error


def test_a_backend_of_a_job_is_installed_made_anew_and_deleted(
    services: Services, node: Node, worker: Jobs, echo: Path, root: Path, tmp_path: Path
) -> None:
    entry = entry_of(pack(tmp_path / "a.tgz", run_script(python_of(echo), echo)))
    first = submit(services, node, "install_backend", entry)
    worker.run(first)
    state, told = result(services, first)
    assert (state, told["name"], told["version"], told["build"]) == (JobState.DONE, "toy", "1", "cpu")
    place = versions.pointer(root, "toy").resolve()
    (tmp_path / "a.tgz").unlink()
    again = submit(services, node, "install_backend", entry)
    worker.run(again)
    assert result(services, again) == (JobState.DONE, told)
    upgrade = submit(services, node, "upgrade_backend", entry)
    worker.run(upgrade)
    assert result(services, upgrade)[0] is JobState.FAILED
    assert versions.pointer(root, "toy").resolve() == place
    entry = entry_of(pack(tmp_path / "a.tgz", run_script(python_of(echo), echo)))
    upgrade = submit(services, node, "upgrade_backend", entry)
    worker.run(upgrade)
    assert result(services, upgrade)[0] is JobState.DONE
    assert versions.pointer(root, "toy").resolve() != place
    (root / "toy" / ".archive" / "blobs").mkdir(parents=True)  # as an install leaves it that failed
    delete = submit(services, node, "delete_backend", entry)
    worker.run(delete)
    assert result(services, delete) == (JobState.DONE, {"name": "toy", "removed": True})
    assert sorted(path.name for path in (root / "toy").iterdir()) == [".lock"]


@pytest.mark.parametrize("kind", ["install_backend", "upgrade_backend"])
def test_a_cancelled_install_leaves_no_file_and_no_process(
    services: Services, node: Node, worker: Jobs, root: Path, tmp_path: Path, kind: str
) -> None:
    mark = tmp_path / "mark"
    script = run_script(Path("/nowhere"), tmp_path, extra=f"sleep 300 & echo $! > {mark}; wait")
    job_id = submit(services, node, kind, entry_of(pack(tmp_path / "a.tgz", script)))
    working = threading.Thread(target=worker.run, args=(job_id,))
    working.start()
    assert wait_for(lambda: mark.exists() and mark.read_text().strip())
    with services.db.transaction() as db:
        job = job_rows.by_id(db, job_id)
    jobs.abort(services, job, Cancelled("It is not needed."), state=JobState.CANCELLED)
    working.join(LIMIT)
    state, error = result(services, job_id)
    assert (state, error["message"]) == (JobState.CANCELLED, "It is not needed.")
    assert wait_for(lambda: not psutil.pid_exists(int(mark.read_text())))
    assert [path.name for path in (root / "toy").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        ({"backend": "ghost"}, "no backend 'ghost'"),
        ({"backend": "toy", "entry": {"name": "../toy"}}, "cannot be read"),
    ],
)
def test_an_order_that_makes_no_sense_fails_with_the_reason(
    services: Services, node: Node, worker: Jobs, request_body: dict, says: str
) -> None:
    request = {"kind": "install_backend", **request_body}
    job_id = jobs.submit_node_job(services, kind="install_backend", node_id=node.id, model_id=None, request=request)
    worker.run(job_id)
    state, error = result(services, job_id)
    assert state is JobState.FAILED
    assert says in error["message"]


def test_a_name_that_leads_out_of_the_folder_is_refused(services: Services, node: Node, worker: Jobs) -> None:
    request = {"kind": "delete_backend", "backend": "../models"}
    job_id = jobs.submit_node_job(services, kind="delete_backend", node_id=node.id, model_id=None, request=request)
    worker.run(job_id)
    assert "is no name of a backend" in result(services, job_id)[1]["message"]


def test_the_api_on_one_node(services: Services, node: Node, call) -> None:
    assert call("GET", "/api/nodes/n1/backends") == []
    told = call("POST", "/api/nodes/n1/backends/install", 202, json={"backend": "echo"})
    assert call("GET", f"/api/jobs/{told['jobID']}")["kind"] == "install_backend"
    call("POST", "/api/nodes/n1/backends/install", 404, json={"backend": "ghost"})
    call("POST", "/api/nodes/n1/backends/install", 400, json={"backend": "../x"})
    call("POST", "/api/nodes/n1/backends/install", 400, json={"backend": "echo", "force": 1})
    call("POST", "/api/nodes/n1/backends/upgrade", 404, json={"backend": "echo"})
    found = {"name": "echo", "version": "1", "digest": "a" * 64, "build": "cpu", "installed_at": 1.5}
    nodes.heartbeat(services, node, hardware={"backends": [found]})
    assert call("GET", "/api/nodes/n1/backends") == [found]
    for op in ("upgrade", "delete"):
        told = call("POST", f"/api/nodes/n1/backends/{op}", 202, json={"backend": "echo"})
        assert call("GET", f"/api/jobs/{told['jobID']}")["kind"] == f"{op}_backend"


def test_the_api_on_many_nodes(services: Services, node: Node, call) -> None:
    assert call("GET", "/backends") == call("GET", "/api/backends") == []
    told = call("POST", "/backends/apply", 202, json={"id": "echo"})
    assert call("GET", told["status"]) == told
    assert list(call("GET", "/backends/jobs")) == [told["uuid"]]
    assert call("DELETE", told["status"])["nodes"][0]["status"] == "cancelled"
    call("POST", "/backends/apply", 409, json={"id": "echo", "selector": {"zone": "home"}})
    call("POST", "/backends/apply", 404, json={"id": "echo", "nodes": ["n9"]})
    call("POST", "/backends/apply", 404, json={"id": "nowhere@echo"})
    call("POST", "/backends/apply", 400, json={"id": "builtin@../echo"})
    made = call("POST", "/api/backends/install/builtin@echo", 202)
    assert call("GET", f"/backends/jobs/{made['jobID']}")["gallery_element_name"] == "echo"
    shown = call("GET", f"/api/backends/job/{made['jobID']}")
    assert (shown["galleryElementName"], shown["completed"], "queued" in shown) == ("echo", False, False)
    assert (shown["id"], shown["status_url"]) == (made["jobID"], f"/backends/jobs/{made['jobID']}")
    assert call("GET", "/api/backends/upgrades") == call("POST", "/api/backends/upgrades/check") == {}
    call("POST", "/api/backends/system/delete/ghost", 409)
    call("DELETE", f"/backends/jobs/{made['jobID']}")
    shown = call("GET", f"/api/backends/job/{made['jobID']}")
    assert (shown["processed"], shown["cancelled"], shown["completed"]) == (True, True, False)
    for path in ("/backends", "/api/backends"):
        call("POST", f"{path}/upgrade/builtin@echo", 409)
        call("POST", f"{path}/delete/builtin@echo", 409)
    call("POST", "/backends/upgrade/echo", 409)
    call("POST", "/backends/delete/echo", 409)
    call("GET", "/backends/jobs/nothing", 404)
    for path in ("/backends/available", "/backends/known"):
        assert {entry["name"] for entry in call("GET", path)} >= {"echo", "xllamacpp"}


def test_an_archive_that_an_admin_gives_becomes_a_backend_that_models_can_name(
    services: Services, node: Node, worker: Jobs, echo: Path, root: Path, tmp_path: Path, call
) -> None:
    archive = pack(tmp_path / "a.tgz", run_script(python_of(echo), echo))
    given = {"uri": archive.source, "name": "mine.1", "alias": "chatty", "sha256": archive.sha256}
    told = call("POST", "/backends/apply", 202, json=given)
    assert (told["gallery_element_name"], [each["node_name"] for each in told["nodes"]]) == ("mine.1", ["n1"])
    backends.fulfil(services)
    worker.run(call("GET", told["status"])["nodes"][0]["job"])
    jobs.apply_ends(services)
    backends.fulfil(services)
    assert call("GET", told["status"])["nodes"][0]["status"] == "done"
    assert versions.pointer(root, "mine.1").is_symlink()
    nodes.heartbeat(services, node, hardware={"backends": versions.installed(root)})
    (shown,) = call("GET", "/backends")
    assert (shown["name"], shown["nodes"][0]["version"]) == ("mine.1", archive.sha256[:12])
    source = {"source": "https://x.example/m.gguf", "sha256": "1" * 64}
    for name, backend_name in (("a", "chatty"), ("b", "mine.1")):
        call("POST", "/api/models", 201, json={"name": name, "backend": backend_name, **source})
        assert models.named(services, name).config.backend == "mine.1"
    refused = call("POST", "/backends/delete/mine.1", 409)
    assert "that of 2 models" in refused["error"]["message"]
    for name in ("a", "b"):
        call("DELETE", f"/api/models/{name}")
    gone = call("POST", "/backends/delete/mine.1", 202)
    backends.fulfil(services)
    worker.run(call("GET", gone["status"])["nodes"][0]["job"])
    assert versions.installed(root) == []
    call("POST", "/api/models", 404, json={"name": "c", "backend": "chatty", **source})


def test_an_archive_that_is_given_for_one_node_is_installed_there(
    services: Services, node: Node, worker: Jobs, echo: Path, root: Path, tmp_path: Path, call
) -> None:
    archive = pack(tmp_path / "a.tgz", run_script(python_of(echo), echo))
    given = {"uri": archive.source, "name": "mine", "alias": "", "sha256": archive.sha256}
    told = call("POST", "/api/nodes/n1/backends/install", 202, json=given)
    worker.run(told["jobID"])
    state, made = result(services, told["jobID"])
    assert (state, made["name"], versions.pointer(root, "mine").is_symlink()) == (JobState.DONE, "mine", True)
    assert call("GET", "/backends/jobs") == {}
    assert "external@mine" in {one["id"] for one in call("GET", "/backends/available")}


def test_an_archive_with_another_content_is_not_installed(
    services: Services, node: Node, worker: Jobs, echo: Path, root: Path, tmp_path: Path, call
) -> None:
    archive = pack(tmp_path / "a.tgz", run_script(python_of(echo), echo))
    told = call("POST", "/api/backends/install-external", 202,
                json={"uri": archive.source, "name": "mine", "sha256": "0" * 64, "alias": ""})  # fmt: skip
    backends.fulfil(services)
    (there,) = call("GET", f"/backends/jobs/{told['jobID']}")["nodes"]
    worker.run(there["job"])
    state, error = result(services, there["job"])
    assert (state, "expected" in error["message"]) == (JobState.FAILED, True), error
    assert versions.installed(root) == []


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({"uri": "https://x.example/b.tgz", "name": "mine"}, 400, "needs its SHA-256"),
        ({"uri": "quay.io/x/y:1", "name": "mine"}, 400, "no source of a model's file"),
        ({"uri": "file:/a/../b.tgz", "name": "mine", "sha256": "1" * 64}, 400, "must not have '..'"),
        (
            {"uri": "https://u:p@x.example/b.tgz", "name": "mine", "sha256": "1" * 64},
            400,
            "would be shown to everybody",
        ),
        ({"uri": "oci://x.example/b:1"}, 400, "Missing required parameter: 'name'"),
        ({"uri": "oci://x.example/b:1", "name": "../mine"}, 400, "'name'"),
        ({"uri": "oci://x.example/b:1", "name": "mine", "alias": "A b"}, 400, "'alias'"),
        ({"uri": "oci://x.example/b:1", "name": "mine", "id": "echo"}, 400, "Unknown parameter: 'id'"),
        ({"uri": "oci://x.example/b:1", "name": "echo"}, 409, "There is a backend 'echo'"),
        ({"uri": "oci://x.example/b:1", "name": "mine", "alias": "echo"}, 409, "There is a backend 'echo'"),
        ({"uri": "oci://x.example/b:1", "name": "mine", "nodes": ["n9"]}, 404, "no node 'n9'"),
        ({"uri": "oci://x.example/b:1", "name": "mine", "selector": {"a": "b"}}, 409, "lacks the label a=b"),
        ({"id": "echo", "alias": "x"}, 400, "Unknown parameter: 'alias'"),
        ({"name": "mine"}, 400, "Missing required parameter: 'id'"),
    ],
)
def test_what_cannot_become_a_backend_is_refused_and_leaves_nothing(
    services: Services, node: Node, call, given: dict, status: int, says: str
) -> None:
    paths = ["/backends/apply", "/api/backends/install-external"]
    paths += ["/api/nodes/n1/backends/install"] * ("uri" in given and not {"nodes", "selector"} & given.keys())
    for path in paths:
        assert says in call("POST", path, status, json=given)["error"]["message"]
    assert galleries.external(services) == []
    assert call("GET", "/backends/jobs") == {}
