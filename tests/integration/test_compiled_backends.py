"""Backends with a package that a node compiles: installed as a node does it, what is left when that is ended, and what one
node gives to others."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster_data import api_over_http, node_named, ready_node
from toy_backends import entry_of, member, pack
from toy_packages import offer, package
from waiting import LIMIT, wait_for

from localai_q.bus import journal
from localai_q.cluster.backends import Op
from localai_q.cluster.events import Progress
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.cluster.wheels import WheelKey
from localai_q.config import Settings
from localai_q.errors import Cancelled
from localai_q.gallery.catalog import BackendEntry, backend
from localai_q.names import new_id
from localai_q.services import backends, fleet, galleries, jobs, uploads, wheels
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
        archive = pack(tmp_path / f"{new_id()}.tgz", member("server.py", code.encode()), member("requirements.txt"))
        return entry_of(archive, compiled=(package(**settings),))

    return make


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    galleries._of_backends.clear()
    return settings.model_copy(update={"backend_galleries": str(tmp_path / "gallery.yaml")})


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
    assert wait_for(lambda: len(pids(mark)) == 2)
    with services.db.transaction() as db:
        job = job_rows.by_id(db, job_id)
    jobs.abort(services, job, Cancelled(), state=JobState.CANCELLED)
    working.join(LIMIT)
    assert result(services, job_id)[0] is JobState.CANCELLED
    assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids(mark)))
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
            assert wait_for(lambda: len(pids(mark)) == 2)
        finally:
            process.send_signal(signal.SIGKILL)
    assert [path.name for path in (root / "toy").glob(".*.part")]
    assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids(mark)))
    assert wait_for(lambda: versions.tidy(root) or left(root, tmp_path) == {".lock"})


# --- from one node to others


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


class Machine:
    """A node on a machine of its own, which has compiled nothing yet."""

    def __init__(self, services: Services, api: str, home: Path, *, builder: bool = False) -> None:
        self.name, self._services = home.name, services
        identity = Identity(home / "identity.json")
        self.node = ready_node(services, self.name, secret=identity.secret())
        if builder:
            fleet.give_labels(services, self.name, {"builder": "true"}, keep=True)
        self.root, self.cache = home / "backends", home / "cache"
        spec = ChildSpec(
            node_id=self.node.id, node_name=self.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
            journal_max=1000, load_stall=60.0, status_fd=-1, backends=self.root, models=home / "models", api_url=api,
            identity=identity.path,
        )  # fmt: skip
        self._jobs = Jobs(spec, identity, home / "run")

    def begin(self, entry: BackendEntry, patch: pytest.MonkeyPatch) -> tuple[str, threading.Thread]:
        """Have it install the backend."""
        job_id = submit(self._services, self.node, entry)
        return job_id, self.begin_job(job_id, patch)

    def begin_job(self, job_id: str, patch: pytest.MonkeyPatch) -> threading.Thread:
        patch.setenv("LOCALAI_Q_WHEEL_CACHE", str(self.cache))
        before = children()
        thread = threading.Thread(target=self._jobs.run, args=(job_id,))
        thread.start()
        assert wait_for(lambda: children() - before or not thread.is_alive())  # the job has this environment
        return thread

    def install(self, entry: BackendEntry, patch: pytest.MonkeyPatch) -> tuple[JobState, dict]:
        job_id, thread = self.begin(entry, patch)
        thread.join()
        return result(self._services, job_id)

    def has_compiled(self) -> bool:
        return bool(list((self.cache / "blobs").glob("[0-9a-f]*")))

    def module(self) -> bytes:
        """The compiled code that its backend uses."""
        (found,) = self.root.glob("toy/current/venv/lib/python*/site-packages/toy_package/toy.so")
        return found.read_bytes()


@pytest.fixture
def api(services: Services) -> Iterator[str]:
    with api_over_http(services) as url:
        yield url


@pytest.fixture
def offered(make_entry, tmp_path: Path) -> Callable[..., BackendEntry]:
    """Makes a backend that the gallery lists."""

    def make(**settings: str) -> BackendEntry:
        entry = make_entry(**settings)
        (tmp_path / "gallery.yaml").write_text(json.dumps([entry.model_dump(mode="json")]))
        return entry

    return make


def without_compilers(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(exist_ok=True)
    patch.setenv("PATH", str(tmp_path / "empty"))


def test_a_node_without_a_compiler_takes_what_a_builder_has_compiled(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = offered(word="shared")
    first, second = Machine(services, api, tmp_path / "n1", builder=True), Machine(services, api, tmp_path / "n2")
    assert first.install(entry, monkeypatch)[0] is JobState.DONE
    (wheel,) = wheels.listed(services)
    assert (wheel["node"], wheel["package"], wheel["backends"]) == ("n1", "toy-package", ["toy"])
    without_compilers(monkeypatch, tmp_path)
    state, told = second.install(entry, monkeypatch)
    assert state is JobState.DONE, told
    assert second.module() == first.module()
    assert not second.has_compiled()
    assert [path.name for path in (tmp_path / "n2" / "models" / "blobs").glob("[0-9a-f]*")] == [wheel["sha256"]]


def test_what_a_node_without_the_label_has_compiled_stays_its_own(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = offered()
    assert Machine(services, api, tmp_path / "n1").install(entry, monkeypatch)[0] is JobState.DONE
    assert wheels.listed(services) == []
    without_compilers(monkeypatch, tmp_path)
    state, error = Machine(services, api, tmp_path / "n2").install(entry, monkeypatch)
    assert state is JobState.FAILED
    assert "apt install g++" in error["message"]


def test_a_builder_gives_what_its_machine_had_compiled_before(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, node = offered(), Machine(services, api, tmp_path / "n1")
    assert node.install(entry, monkeypatch)[0] is JobState.DONE
    fleet.give_labels(services, "n1", {"builder": "true"}, keep=True)
    other = Machine(services, api, tmp_path / "n3")
    other.cache = node.cache  # another node of the same machine
    without_compilers(monkeypatch, tmp_path)
    assert other.install(entry, monkeypatch)[0] is JobState.DONE
    assert wheels.listed(services) == []
    fleet.give_labels(services, "n3", {"builder": "true"}, keep=True)
    assert versions.remove(other.root, "toy")
    assert other.install(entry, monkeypatch)[0] is JobState.DONE
    assert [wheel["node"] for wheel in wheels.listed(services)] == ["n3"]


def test_a_wheel_with_another_content_is_refused_and_compiled_instead(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = offered(word="honest")
    assert Machine(services, api, tmp_path / "n1", builder=True).install(entry, monkeypatch)[0] is JobState.DONE
    (wheel,) = wheels.listed(services)
    path = uploads.path_of(services, wheel["sha256"])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    second = Machine(services, api, tmp_path / "n2")
    assert second.install(entry, monkeypatch)[0] is JobState.DONE
    assert second.has_compiled()
    assert not list((tmp_path / "n2" / "models" / "blobs").glob("[0-9a-f]*"))
    without_compilers(monkeypatch, tmp_path)
    state, error = Machine(services, api, tmp_path / "n3").install(entry, monkeypatch)
    assert state is JobState.FAILED
    assert "no C++ compiler" in error["message"]
    assert "what node n1 has compiled cannot be had" in error["message"]
    assert "another content than expected" in error["message"]


def test_a_wheel_that_does_not_work_is_not_switched_to(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a builder gives is what it says, but it lies: the code says another word."""
    entry = offered(word="right")
    first = Machine(services, api, tmp_path / "n1", builder=True)
    assert first.install(entry, monkeypatch)[0] is JobState.DONE
    (wheel,) = wheels.listed(services)
    wrong = Machine(services, api, tmp_path / "n4").install(offered(word="wrong"), monkeypatch)
    assert wrong[0] is JobState.DONE
    (made,) = (tmp_path / "n4" / "cache" / "blobs").glob("[0-9a-f]*")
    offered(word="right")
    galleries._of_backends.clear()
    wheels.remove(services, wheel["id"])
    key = WheelKey.model_validate({name: wheel[name] for name in WheelKey.model_fields})
    with made.open("rb") as file:
        chunk = uploads.Chunk(size=made.stat().st_size)
        wheels.take(services, node_named(services, "n1"), key.digest, key, made.name, file, chunk)
    second = Machine(services, api, tmp_path / "n2")
    state, error = second.install(entry, monkeypatch)
    assert state is JobState.FAILED
    assert "does not start on this machine" in error["message"]
    assert "AssertionError" in error["message"]
    assert versions.current(second.root, "toy") is None


def test_a_node_waits_for_the_builder_that_compiles_the_same(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, count = tmp_path / "mark", tmp_path / "count"
    entry = offered(hang=str(mark), count=str(count))
    first = Machine(services, api, tmp_path / "n1", builder=True)
    second = Machine(services, api, tmp_path / "n2")
    one, working = first.begin(entry, monkeypatch)
    assert wait_for(lambda: len(pids(mark)) == 2)
    two, waiting = second.begin(entry, monkeypatch)

    def last() -> Progress | None:
        return journal.latest(services.redis, [two]).get(two)

    assert wait_for(lambda: isinstance(last(), Progress) and last().stage == "waiting")
    assert last().note == "node n1 compiles it (50 %)"
    os.killpg(pids(mark)[1], signal.SIGKILL)  # then the builder goes on
    working.join()
    waiting.join()
    assert [result(services, job_id)[0] for job_id in (one, two)] == [JobState.DONE] * 2
    assert count.read_text() == "1"
    assert second.module() == first.module()


def test_a_node_compiles_by_itself_when_the_builder_fails(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    entry = offered(hang=str(mark))
    first, second = Machine(services, api, tmp_path / "n1", builder=True), Machine(services, api, tmp_path / "n2")
    one, working = first.begin(entry, monkeypatch)
    assert wait_for(lambda: len(pids(mark)) == 2)
    before = pids(mark)
    _, waiting = second.begin(entry, monkeypatch)
    with services.db.transaction() as db:
        job = job_rows.by_id(db, one)
    jobs.abort(services, job, Cancelled(), state=JobState.CANCELLED)
    working.join()
    jobs.apply_ends(services)
    assert wait_for(lambda: len(pids(mark)) == 2 and pids(mark) != before)
    os.killpg(pids(mark)[1], signal.SIGKILL)
    waiting.join()
    assert second.has_compiled()


def test_while_the_api_is_away_a_node_compiles_by_itself(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Machine(services, "http://127.0.0.1:9", tmp_path / "n1", builder=True)
    assert node.install(offered(), monkeypatch)[0] is JobState.DONE
    assert node.has_compiled()


def test_one_request_for_all_nodes_compiles_once(
    services: Services, api: str, offered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    offered(count=str(count))
    names = ("n1", "n2", "n3")
    machines = {name: Machine(services, api, tmp_path / name, builder=name == "n2") for name in names}
    operation = backends.change_everywhere(services, Op.INSTALL, "toy")
    backends.fulfil(services)
    told = {one["node_name"]: one["job"] for one in backends.operation(services, operation["uuid"])["nodes"]}
    working = [machines[name].begin_job(told[name], monkeypatch) for name in names]
    for thread in working:
        thread.join()
    jobs.apply_ends(services)
    backends.fulfil(services)
    shown = backends.operation(services, operation["uuid"])
    assert (shown["processed"], shown["error"]) == (True, None)
    assert count.read_text() == "1"
    assert len({machine.module() for machine in machines.values()}) == 1
    assert [name for name in names if machines[name].has_compiled()] == ["n2"]
