"""Wherever a node's job is when it is cancelled, or it or its worker is killed: nothing goes on, and nothing stays."""

import json
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from cluster_data import expire, ready_node, watched
from file_server import FileServer, Remote, Seen, serve
from test_model_jobs import result, submit
from toy_backends import entry_of, member, pack, run_script
from waiting import wait_for

from localai_q import names
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled
from localai_q.services import jobs
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from workers import versions
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.digests import PIECE
from workers.node.jobs import Jobs
from workers.node.store import Store

PATIENCE = 60.0  # seconds until something happens on a crowded machine
DIGEST = "1" * 64
WORKER = (
    "import sys; from pathlib import Path; from workers.child import ChildSpec; from workers.identity import Identity\n"
    "from workers.node.jobs import Jobs\n"
    "spec = ChildSpec.model_validate_json(sys.argv[1])\n"
    "Jobs(spec, Identity(spec.identity), Path(sys.argv[2])).run(sys.argv[3])\n"
)


@dataclass
class Ground:
    """A node with one worker of jobs, on folders of its own, and the server that all comes from."""

    services: Services
    node: Node
    server: FileServer
    home: Path
    spec: ChildSpec
    folder: Path = field(init=False)
    temporary: Path = field(init=False)
    servers: list[psutil.Process] = field(init=False)
    prepare: Callable[[], None] = lambda: None  # what a job finds when it begins

    def __post_init__(self) -> None:
        self.servers = psutil.Process().children()
        self.folder, self.temporary = self.home / "run", self.home / "tmp"
        self.folder.mkdir()
        self.temporary.mkdir()

    def asked(self, words: str, method: str = "GET") -> bool:
        """Whether the server was asked for such a path."""
        return any(words in f"{seen.path} " and seen.method == method for seen in self.server.seen)

    def part(self) -> Path:
        return Store(self.spec.models).part(DIGEST)

    def started(self) -> list[psutil.Process]:
        """The processes that jobs have started, and theirs."""
        own = [child for child in psutil.Process().children() if child not in self.servers]
        return [process for child in own for process in family(child)]

    def child(self) -> psutil.Process | None:
        """The process of the job."""
        return next((each for each in self.started() if "workers.node.job_child" in line(each)), None)

    def left(self) -> list[str]:
        """Every file and folder that lies where jobs work, but for locks, logs and what says what a source is."""
        roots = (self.spec.backends, self.spec.models, self.folder, self.temporary)
        found = [path for root in roots for path in root.rglob("*")]
        known = (self.spec.backends / "toy", self.spec.backends / "toy" / ".lock", self.spec.models / "blobs")
        return sorted(str(path.relative_to(self.home)) for path in found if path not in known)


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass(frozen=True)
class Stage:
    """Where a job can be: how it gets there and stands still, and how that shows."""

    begin: Callable[[Ground], dict]
    reached: Callable[[Ground], object]


def model(ground: Ground, **more: object) -> dict:
    return {"kind": "fetch_model", "source": f"{ground.server.url}/m", "sha256": DIGEST, "size": 0, **more}


def resolving(ground: Ground) -> dict:
    def stand_still(seen: Seen) -> Remote | None:
        if "/resolve/" in seen.path:
            ground.server.halted.wait(PATIENCE)
        return ground.server.files.get(seen.path)

    ground.server.answer = stand_still
    return model(ground, source="hf://o/r/m.gguf")


def downloading(ground: Ground) -> dict:
    ground.server.put("/m", Remote(bytes(1 << 20), pause=0.5, block=4096))
    return model(ground)


def hashing(ground: Ground) -> dict:
    """What came before takes a minute to look through, and no disk."""

    def lay() -> None:
        ground.part().parent.mkdir(parents=True, exist_ok=True)
        with ground.part().open("wb") as file:
            file.truncate(64 << 30)

    ground.prepare = lay
    return model(ground, size=65 << 30)


def staging(ground: Ground) -> dict:
    blob = ground.server.put(f"/blobs/{DIGEST}", Remote(bytes(2 * PIECE), pause=0.5, block=4096, headers={
        "Content-Range": f"bytes 0-{PIECE - 1}/{2 * PIECE}"}))  # fmt: skip
    holder = {"node": "h1", "name": "h1", "url": blob, "ticket": "x"}
    told = json.dumps({"holders": [holder], "stored": False}).encode()
    ground.server.put(f"/api/node/{ground.node.id}/holders/{DIGEST}", Remote(told))
    return model(ground)


def backend(ground: Ground, *members: object, **build: object) -> dict:
    entry = entry_of(pack(ground.home / "a.tgz", *members), **build)
    return {"kind": "install_backend", "backend": "toy", "entry": entry.model_dump(mode="json")}


def unpacking(ground: Ground) -> dict:
    return backend(ground, *[member(f"{number // 1000}/{number}", b"x") for number in range(20_000)])


def packages(ground: Ground) -> dict:
    """A wheel that comes slowly, of an index of its own."""
    name = "toy_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(ground.home / name, "w") as wheel:
        wheel.writestr("toy_wheel.bin", bytes(1 << 20))
    ground.server.put(f"/{name}", Remote((ground.home / name).read_bytes(), pause=0.5, block=4096))
    ground.server.put(f"/{name}.metadata", Remote(b"Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n"))
    page = f'<a href="/{name}" data-dist-info-metadata="true">{name}</a>'.encode()
    ground.server.put("/simple/toy-wheel/", Remote(page, headers={"Content-Type": "text/html"}))
    return backend(ground, member("server.py", b""), member("requirements.txt", b""), requirements=("toy-wheel==1.0",))


def health(ground: Ground) -> dict:
    extra = f"echo $$ > {ground.home}/answers-not; exec sleep 600"
    return backend(ground, run_script(Path("/nowhere"), ground.home, extra=extra))


STAGES = {
    "resolving": Stage(resolving, lambda ground: ground.asked("/resolve/", "HEAD")),
    "downloading": Stage(downloading, lambda ground: ground.part().exists() and ground.part().stat().st_size),
    "hashing": Stage(hashing, lambda ground: ground.child() and reads(ground.child(), ground.part())),
    "staging": Stage(staging, lambda ground: ground.asked("/blobs/")),
    "unpacking": Stage(unpacking, lambda ground: list(ground.spec.backends.glob("toy/.*.part/*/*"))),
    "packages": Stage(packages, lambda ground: ground.asked(".whl ")),
    "health": Stage(health, lambda ground: (ground.home / "answers-not").exists()),
}


def reads(process: psutil.Process, path: Path) -> bool:
    try:
        return any(Path(each.path) == path for each in process.open_files())
    except psutil.Error:
        return False


@pytest.fixture
def ground(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    identity = Identity(tmp_path / "identity.json")
    with serve() as server:
        server.halted = threading.Event()
        spec = ChildSpec(
            node_id=(node := ready_node(services)).id, node_name=node.name, redis_url=services.settings.redis_url,
            lease=5.0, journal_ttl=60.0, journal_max=1000, load_stall=600.0, status_fd=-1, backends=tmp_path / "backends",
            models=tmp_path / "models", api_url=server.url, identity=identity.path,
        )  # fmt: skip
        found = Ground(services, node, server, tmp_path, spec)
        for name, value in {
            "LOCALAI_Q_ALLOW_PRIVATE_SOURCES": "true", "LOCALAI_Q_DISK_SPARE": "0", "HF_ENDPOINT": server.url,
            "LOCALAI_Q_MAX_UPLOAD": str(1 << 40), "UV_DEFAULT_INDEX": f"{server.url}/simple", "TMPDIR": str(found.temporary),
            "UV_CACHE_DIR": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", None)  # read anew
        yield found
        server.halted.set()


@contextmanager
def at(ground: Ground, stage: Stage, job_id: str) -> Iterator[threading.Thread]:
    """The job has come so far, and its worker works on it in a thread."""
    worker = Jobs(ground.spec, Identity(ground.spec.identity), ground.folder)
    working = threading.Thread(target=worker.run, args=(job_id,))
    working.start()
    try:
        assert wait_for(lambda: stage.reached(ground), PATIENCE), "it does not come so far"
        started = ground.started()
        assert started
        yield working
        working.join(PATIENCE)
        assert not working.is_alive()
        assert_gone(started)
    finally:
        worker.claims.cancel_all("drain")


def assert_gone(processes: list[psutil.Process]) -> None:
    assert psutil.wait_procs(processes, PATIENCE)[1] == []


def anew(ground: Ground) -> None:
    """Nothing shows any more how far a job was."""
    ground.server.seen.clear()
    (ground.home / "answers-not").unlink(missing_ok=True)
    for path in ground.spec.backends.glob("toy/.*.part"):
        path.rename(ground.home / f"old{path.name}")
    ground.part().unlink(missing_ok=True)
    ground.prepare()


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_goes_on_and_nothing_stays(ground: Ground, stage: str) -> None:
    at_stage, services = STAGES[stage], ground.services
    request = at_stage.begin(ground)
    kind = str(request.pop("kind"))
    ground.prepare()

    # Its worker is killed, without a word.
    job_id = submit(services, ground.node, kind, **request)
    command = [sys.executable, "-c", WORKER, ground.spec.model_dump_json(), str(ground.folder), job_id]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        assert wait_for(lambda: at_stage.reached(ground), PATIENCE), "it does not come so far"
        started = ground.started()
        worker.kill()
    assert_gone(started)
    assert (Store(ground.spec.models).files(), versions.installed(ground.spec.backends)) == ([], [])

    # The next one is given the job, of which the process is killed.
    anew(ground)
    line = names.node_jobs_queue(ground.node.id)
    watched(services)
    expire(services, job_id, line)
    jobs.recover(services)
    with at(ground, at_stage, job_id):
        ground.child().kill()
    state, error = result(services, job_id)
    assert (state, "ended with exit code -9" in error["message"]) == (JobState.FAILED, True), error
    assert (Store(ground.spec.models).files(), versions.installed(ground.spec.backends)) == ([], [])

    # It is asked for again, and cancelled.
    anew(ground)
    job_id = submit(services, ground.node, kind, **request)
    with at(ground, at_stage, job_id):
        with services.db.transaction() as db:
            job = job_rows.by_id(db, job_id)
        jobs.abort(services, job, Cancelled(), state=JobState.CANCELLED)
    assert result(services, job_id)[0] is JobState.CANCELLED
    assert ground.left() == []


def test_a_job_that_was_cancelled_before_its_turn_does_nothing(ground: Ground) -> None:
    request = downloading(ground)
    job_id = submit(ground.services, ground.node, str(request.pop("kind")), **request)
    with ground.services.db.transaction() as db:
        job = job_rows.by_id(db, job_id)
    jobs.abort(ground.services, job, Cancelled(), state=JobState.CANCELLED)
    Jobs(ground.spec, Identity(ground.spec.identity), ground.folder).run(job_id)
    assert result(ground.services, job_id)[0] is JobState.CANCELLED
    assert (ground.server.seen, ground.left(), ground.child()) == ([], [], None)
