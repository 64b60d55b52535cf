"""Backends with a package that a node compiles: installed as a node does it, and what is left when that is ended."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster_data import ready_node
from toy_backends import entry_of, member, pack
from toy_packages import offer, package
from waiting import wait_for

from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled
from localai_q.gallery.catalog import BackendEntry, backend
from localai_q.services import jobs
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


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has its packages from a folder with the toy, and has compiled nothing yet."""
    monkeypatch.setenv("UV_FIND_LINKS", str(offer(tmp_path / "index")))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("LOCALAI_Q_WHEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAI_Q_DISK_SPARE", "0")


@pytest.fixture
def make_entry(tmp_path: Path, echo: Path) -> Callable[..., BackendEntry]:
    """Makes a backend that is the echo server and says a word of compiled code before."""

    def make(**settings: str) -> BackendEntry:
        python = str(python_of(echo))
        code = (
            f"import os, sys, toy_package\nassert toy_package.word() == {settings.get('word', 'nothing')!r}\n"
            f"os.chdir({str(echo)!r})\nos.execv({python!r}, [{python!r}, 'server.py', *sys.argv[1:]])\n"
        )
        archive = pack(tmp_path / "toy.tgz", member("server.py", code.encode()), member("requirements.txt"))
        return entry_of(archive, compiled=(package(**settings),))

    return make


@pytest.fixture
def node(services: Services) -> Node:
    return ready_node(services)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "backends"


@pytest.fixture
def spec(services: Services, node: Node, root: Path, tmp_path: Path) -> ChildSpec:
    return ChildSpec(
        node_id=node.id, node_name=node.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
        journal_max=1000, load_stall=60.0, status_fd=-1, backends=root, models=tmp_path / "models",
        api_url="http://127.0.0.1:9", identity=tmp_path / "identity.json",
    )  # fmt: skip


@pytest.fixture
def worker(spec: ChildSpec, tmp_path: Path) -> Jobs:
    return Jobs(spec, Identity(spec.identity), tmp_path / "run")


def submit(services: Services, node: Node, entry: BackendEntry) -> str:
    request = {"kind": "install_backend", "backend": entry.name, "entry": entry.model_dump(mode="json")}
    return jobs.submit_node_job(services, kind="install_backend", node_id=node.id, model_id=None, request=request)


def result(services: Services, job_id: str) -> tuple[JobState, dict]:
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    return found.state, found.result or found.error


def pids(mark: Path) -> list[int]:
    """The builder and its compiler, once both work."""
    return [int(pid) for pid in mark.read_text().split()] if mark.exists() else []


def left(root: Path, tmp_path: Path) -> set[str]:
    """What lies in the folders of backends and of wheels, but for the lock of one who was killed while he held it."""
    found = {path.name for folder in (root / "toy", tmp_path / "cache" / "blobs") for path in folder.glob("*")}
    return {name for name in found if len(name) < 64}


def test_a_backend_is_installed_with_what_was_compiled(
    services: Services, node: Node, worker: Jobs, root: Path, make_entry
) -> None:
    job_id = submit(services, node, make_entry(word="compiled"))
    worker.run(job_id)
    state, told = result(services, job_id)
    assert (state, told.get("name")) == (JobState.DONE, "toy"), told
    place = versions.pointer(root, "toy").resolve()
    assert not (place / "wheels").exists()
    assert list(place.glob("venv/lib/python*/site-packages/toy_package/toy.so"))


def test_cancelled_in_the_middle_of_a_compilation_it_leaves_no_file_and_no_process(
    services: Services, node: Node, worker: Jobs, root: Path, tmp_path: Path, make_entry
) -> None:
    mark = tmp_path / "mark"
    job_id = submit(services, node, make_entry(hang=str(mark)))
    working = threading.Thread(target=worker.run, args=(job_id,))
    working.start()
    assert wait_for(lambda: len(pids(mark)) == 2, 60)
    with services.db.transaction() as db:
        job = job_rows.by_id(db, job_id)
    jobs.abort(services, job, Cancelled(), state=JobState.CANCELLED)
    working.join(60)
    assert result(services, job_id)[0] is JobState.CANCELLED
    assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids(mark)), 30)
    assert left(root, tmp_path) == {".lock"}


def test_when_the_worker_of_jobs_is_killed_what_it_compiled_ends_and_is_removed(
    services: Services, node: Node, spec: ChildSpec, root: Path, tmp_path: Path, make_entry
) -> None:
    mark, order = tmp_path / "mark", tmp_path / "spec.json"
    job_id = submit(services, node, make_entry(hang=str(mark)))
    Identity(spec.identity)
    order.write_text(spec.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from workers.child import ChildSpec; from workers.identity import Identity\n"
        "from workers.node.jobs import Jobs\n"
        "spec = ChildSpec.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "Jobs(spec, Identity(spec.identity), Path(sys.argv[2])).run(sys.argv[3])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(order), str(tmp_path / "run"), job_id]) as process:
        try:
            assert wait_for(lambda: len(pids(mark)) == 2, 60)
        finally:
            process.send_signal(signal.SIGKILL)
    assert [path.name for path in (root / "toy").glob(".*.part")]
    assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids(mark)), 30)
    assert wait_for(lambda: versions.tidy(root) or left(root, tmp_path) == {".lock"}, 30)
