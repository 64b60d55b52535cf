"""A node's replicas, as real processes: what they leave behind, what hangs, and what does not want to end."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from waiting import LIMIT, wait_for

from localai_q import names
from localai_q.bus import journal
from localai_q.bus.connection import client
from localai_q.bus.leases import Leases, Submission
from localai_q.cluster.events import End, Event, Progress
from localai_q.cluster.jobs import LOAD
from localai_q.cluster.reports import Report
from localai_q.cluster.states import JobState
from localai_q.embedded.valkey import Valkey
from localai_q.errors import Cancelled, LocalAIError, Unavailable, to_record
from localai_q.gallery import catalog
from workers import versions
from workers.child import ChildSpec, ModelSpec, ReplicaSpec
from workers.identity import Identity
from workers.node import children as module
from workers.node import leftovers
from workers.node.children import Children, Load
from workers.node.installer import install_backend
from workers.node.stalls import LEAST_READ, LONGEST, Watch, longest


class Node:
    """A node's children, and what is reported of them."""

    def __init__(self, home: Path, redis_url: str, echo: Path) -> None:
        self.home = home
        self.told: list[tuple[str, str, str]] = []
        self.children = Children(home, lambda *report: self.told.append(report), drain_timeout=0.5)
        self.load_stall = 300.0
        self.identity = home / "identity.json"
        Identity(self.identity)
        self._redis_url = redis_url
        self._echo = echo
        self.leases = Leases(client(redis_url), lease=5.0, journal_ttl=60.0, journal_max=1000)
        self.redis = client(redis_url)

    def submit(self) -> str:
        """A load that waits for a replica; they have one id here."""
        replica_id = names.new_id()
        request = {"kind": LOAD, "replica": replica_id}
        line = names.replica_queue(replica_id)
        self.leases.submit(Submission(job_id=replica_id, line=line, request=request), longest_line=1)
        return replica_id

    def start(
        self, *, backend: Path | None = None, slots: int = 2, options: list[str] | None = None, replica_id: str = ""
    ) -> str:
        replica_id = replica_id or self.submit()
        model = ModelSpec(id=names.new_id(), name="m", revision=1, backend="echo", slots=slots, options=options or [])
        replica = ReplicaSpec(
            id=replica_id, number=1, job=replica_id, model=model, backend_folder=backend or self._echo, blobs=self.home / "blobs",
            socket=self.home / "run" / f"{replica_id}.sock", log=self.home / "logs" / f"backend-{replica_id}.log",
        )  # fmt: skip
        self.children.start_replica(self.spec(replica))
        return replica_id

    def spec(self, replica: ReplicaSpec | None = None) -> ChildSpec:
        return ChildSpec(
            node_id="n1", node_name="alpha", redis_url=self._redis_url, lease=5.0, journal_ttl=60.0, journal_max=1000,
            load_stall=self.load_stall, status_fd=-1, backends=self.home, models=self.home, api_url="", identity=self.identity, replica=replica,
        )  # fmt: skip

    def begun(self, *options: str) -> str:
        """A replica whose backend is at its load."""
        replica_id = self.start(options=list(options))
        assert wait_for(lambda: [event.stage for event in self.said(replica_id)[1]][-1:] == ["loading"])
        return replica_id

    def said(self, replica_id: str) -> tuple[list[int], list[Event]]:
        """The attempts at its load, and what the job of that has said."""
        entries = journal.tail(self.redis, replica_id, 100)
        return [entry.attempt for entry in entries], [entry.event for entry in entries if entry.event]

    def ended(self, replica_id: str) -> tuple[str, str]:
        """The state and the error that its load has ended with."""
        end = self.said(replica_id)[1][-1]
        assert isinstance(end, End), end
        assert not self.leases.held(names.replica_queue(replica_id)), "a lease is left"
        return end.state, (end.error or {}).get("message", "")

    def hears(self, replica_id: str, state: str) -> str:
        """Wait for a report; its reason."""
        found = wait_for(lambda: [told for told in self.told if told[:2] == (replica_id, state)])
        assert found, (state, self.told)
        return found[0][2]

    def running(self) -> dict[str, str]:
        return {told["id"]: told["state"] for told in self.children.reports()}

    def process(self, replica_id: str) -> psutil.Process:
        return psutil.Process(self.children._replicas[replica_id].process.pid)

    def left(self, folder: str, replica_id: str) -> list[str]:
        return [path.name for path in (self.home / folder).iterdir() if replica_id in path.name]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_backend(catalog.backend("echo"), tmp_path_factory.mktemp("backends"), lambda _: None)


@pytest.fixture
def node(tmp_path: Path, valkey: Valkey, redis_client: redis.Redis, echo: Path) -> Iterator[Node]:
    found = Node(tmp_path, valkey.url, echo)
    yield found
    found.children.stop_all(1.0)


@pytest.fixture
def never_ready(tmp_path: Path) -> Path:
    """A backend that never answers."""
    folder = tmp_path / "never"
    folder.mkdir()
    (folder / "run.sh").write_text('#!/bin/sh\necho "arguments: $*"\nexec sleep 100\n')
    (folder / "run.sh").chmod(0o755)
    return folder


def arguments_of(replica: psutil.Process) -> list[str]:
    return next(child.cmdline() for child in replica.children() if "server.py" in child.cmdline())


def test_our_own_backend_has_a_thread_for_every_slot_and_some_for_its_health(node: Node) -> None:
    replica_id = node.start(slots=100)
    node.hears(replica_id, "ready")
    replica = node.process(replica_id)
    command = " ".join(arguments_of(replica))
    assert "--threads 116" in command
    assert f"--parent {replica.pid}" in command


def test_a_replica_is_reported_with_what_it_is_and_how_long_it_took(node: Node) -> None:
    began = time.monotonic()
    replica_id = node.start(slots=3)
    (told,) = node.children.reports()
    assert (told["id"], told["state"], told["load_seconds"]) == (replica_id, "loading", 0.0)
    node.hears(replica_id, "ready")
    assert wait_for(lambda: node.running()[replica_id] == "ready")
    (told,) = node.children.reports()
    report = Report.model_validate(told)
    assert (report.slots, report.number, report.revision, report.in_flight) == (3, 1, 1, 0)
    assert 0.1 < report.load_seconds < time.monotonic() - began + 0.01  # it is rounded
    node.children.stop_replica(replica_id)
    assert node.running() in ({replica_id: "stopping"}, {})


def test_a_backend_with_a_run_script_is_told_its_address_only(node: Node, never_ready: Path) -> None:
    replica_id = node.start(backend=never_ready)
    log = node.home / "logs" / f"backend-{replica_id}.log"
    assert wait_for(lambda: log.exists() and log.read_text())
    assert log.read_text().split() == ["arguments:", "--addr", f"unix:{node.home}/run/{replica_id}.sock"]


def test_the_brokers_password_lies_in_no_file_once_a_replica_has_read_it(node: Node) -> None:
    replica_id = node.start()
    node.hears(replica_id, "ready")
    assert node.left("run", replica_id) == [f"{replica_id}.sock"]


def test_a_replica_that_ends_as_asked_leaves_nothing(node: Node) -> None:
    replica_id = node.start()
    node.hears(replica_id, "ready")
    assert len(node.left("logs", replica_id)) == 2
    node.children.stop_replica(replica_id)
    assert node.hears(replica_id, "gone") == ""
    assert node.left("run", replica_id) == []
    assert node.left("logs", replica_id) == []


def test_a_replica_that_hangs_is_noticed_killed_and_reported(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 6.0)
    calm, hanging = node.start(), node.start()
    for replica_id in (calm, hanging):
        node.hears(replica_id, "ready")
    replica = node.process(hanging)
    family = [replica, *replica.children(recursive=True)]
    replica.send_signal(signal.SIGSTOP)
    assert "nothing was heard of it for 6 s" in node.hears(hanging, "failed")
    assert not psutil.wait_procs(family[1:], timeout=LIMIT)[1]
    assert node.left("logs", hanging), "what it said last is kept"
    assert node.running() == {calm: "ready"}, "one that says that it is alive stays as it is"


def test_what_a_backend_has_started_ends_with_a_replica_that_is_killed(node: Node, never_ready: Path) -> None:
    (never_ready / "run.sh").write_text("#!/bin/sh\nsleep 300 & echo $!\nwait\n")
    replica_id = node.start(backend=never_ready)
    log = node.home / "logs" / f"backend-{replica_id}.log"
    assert wait_for(lambda: log.exists() and log.read_text().strip())
    started = psutil.Process(int(log.read_text()))
    node.process(replica_id).kill()
    node.hears(replica_id, "failed")
    assert not psutil.wait_procs([started], timeout=LIMIT)[1]


def test_a_load_that_hangs_is_ended_with_all_its_processes_and_one_that_works_goes_on(node: Node) -> None:
    node.load_stall = 3.0
    busy, hanging = node.start(options=["load_work_ms:6000"]), node.start(options=["load_ms:100000"])
    assert wait_for(lambda: node.process(hanging).children())
    family = node.process(hanging).children(recursive=True)
    reason = node.hears(hanging, "failed")
    assert re.match(r"loading stalled: nothing moved for [45] s, [0-9]+ s after it began", reason), reason
    assert not psutil.wait_procs(family, timeout=LIMIT)[1]
    node.hears(busy, "ready")
    assert [told for told in node.told if told[0] == busy] == [(busy, "ready", "")]
    (told,) = node.children.reports()
    assert told["load_seconds"] > 2 * node.load_stall


def test_a_backend_that_never_answers_is_ended_too(node: Node, never_ready: Path) -> None:
    node.load_stall = 2.0
    replica_id = node.start(backend=never_ready)
    assert "its last words: arguments: --addr" in node.hears(replica_id, "failed").replace("the backend's", "its")


def test_a_large_file_has_longer_and_what_is_busy_for_ever_ends_too(tmp_path: Path) -> None:
    watch = Watch(os.getpid(), 5.0)
    load = Load(watch, longest(3 << 30, 5.0), LONGEST, tmp_path / "none")
    assert load.longest == 65.0
    watch._moved = lambda: False
    looks = 1
    while not load.verdict():
        looks += 1
    assert looks == 66
    watch._moved = lambda: True
    assert load.verdict() == ""
    watch.elapsed = watch.silent = LONGEST
    assert load.verdict() == (
        "loading is busy for ever: nothing was heard of its progress for 21601 s, 21601 s after it began"
    )
    assert longest(1 << 60, 5.0) == LONGEST


def test_a_load_that_works_but_reads_nothing_any_more_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY", 3.0)
    reason = node.hears(node.start(options=["load_work_ms:600000"]), "failed")
    assert re.match(r"loading is busy for ever: it has read nothing for [0-9]+ s, [0-9]+ s after it began", reason), (
        reason
    )


def test_a_load_that_reads_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(LEAST_READ))
    watch = Watch(os.getpid(), 5.0)
    load = Load(watch, 5.0, 2.0, tmp_path / "none")
    for _ in range(6):
        (tmp_path / "file").read_bytes()
        assert load.verdict() == ""
    assert [bool(load.verdict()) for _ in range(4)][-1]


def test_a_jobs_worker_that_hangs_is_started_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 6.0)
    node.children.start_jobs_worker(node.spec())
    assert wait_for(lambda: node.children._jobs.state == "ready")
    first = node.children._jobs
    os.kill(first.process.pid, signal.SIGSTOP)
    assert wait_for(lambda: node.children._jobs is not first and node.children._jobs.state == "ready")
    assert first.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("stopped", [False, True])
def test_a_replica_that_is_still_loading_can_be_stopped_even_if_it_hangs(
    node: Node, never_ready: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr(module, "LAST_PATIENCE", 1.0 if stopped else 3600.0)
    replica_id = node.start(backend=never_ready)
    assert wait_for(lambda: node.left("logs", replica_id)[1:]), "its backend is running"
    if stopped:
        replica = node.process(replica_id)
        replica.suspend()
        assert wait_for(lambda: replica.status() == psutil.STATUS_STOPPED)  # until then SIGTERM would still end it
    process = node.children._replicas[replica_id].process
    node.children.stop_replica(replica_id)
    node.children.stop_replica(replica_id)  # the API says it again with every heartbeat
    node.hears(replica_id, "gone")
    assert (process.returncode == -signal.SIGKILL) is stopped
    assert node.running() == {}


def test_a_report_that_waits_for_the_api_keeps_nobody_from_being_heard(
    tmp_path: Path, valkey: Valkey, redis_client: redis.Redis, echo: Path
) -> None:
    node, go_on = Node(tmp_path, valkey.url, echo), threading.Event()
    node.children._send = lambda *_: go_on.wait(LIMIT)
    replica_id = node.start()
    assert wait_for(lambda: node.running() == {replica_id: "ready"})
    heard = node.children._replicas[replica_id]
    heard.tokens_per_second = -1.0
    assert wait_for(lambda: heard.tokens_per_second != -1.0), "it says that it is alive, and is heard"
    assert not go_on.is_set()
    go_on.set()
    node.children.stop_all(2.0)


def test_a_load_is_a_job_that_says_how_far_it_is_and_is_done(node: Node) -> None:
    replica_id = node.start()
    node.hears(replica_id, "ready")
    starting, loading, end = node.said(replica_id)[1]
    assert (starting, loading) == (Progress(stage="starting", note="the backend echo"), Progress(stage="loading"))
    assert node.ended(replica_id) == ("done", "")
    assert 0 < end.timings["total"] < LIMIT


def test_a_load_that_is_cancelled_ends_with_all_its_processes(node: Node) -> None:
    replica_id = node.begun("load_ms:100000")
    replica = node.process(replica_id)
    family = [replica, *replica.children(recursive=True)]
    end = End(state=JobState.CANCELLED, error=to_record(Cancelled()))
    assert node.leases.abort(replica_id, names.replica_queue(replica_id), end) == "asked"
    assert node.hears(replica_id, "failed") == "The job was cancelled."
    assert not psutil.wait_procs(family, timeout=LIMIT)[1]
    assert node.ended(replica_id) == ("cancelled", "The job was cancelled.")


@pytest.mark.parametrize(
    "error", [Cancelled(), Unavailable("Not needed: it is in the way.")], ids=["cancelled", "ended"]
)
def test_a_load_that_has_ended_before_its_process_was_there_is_not_begun(node: Node, error: LocalAIError) -> None:
    replica_id = node.submit()
    end = End(state=JobState.FAILED, error=to_record(error))
    assert node.leases.abort(replica_id, names.replica_queue(replica_id), end) == "ended"
    node.start(replica_id=replica_id)
    assert node.hears(replica_id, "failed") == error.message
    assert node.left("logs", replica_id) == [f"replica-{replica_id}.log"], "its backend was started"


def test_a_load_that_is_ended_under_its_process_ends_that(node: Node) -> None:
    replica_id = node.begun("load_ms:100000")
    backend = node.process(replica_id).children()
    end = End(state=JobState.FAILED, error=to_record(Unavailable("It is not needed.")))
    line = names.replica_queue(replica_id)
    assert node.leases.abort(replica_id, line, end, force=True) == "ended"
    node.hears(replica_id, "failed")
    assert not psutil.wait_procs(backend, timeout=LIMIT)[1]
    assert node.ended(replica_id) == ("failed", "It is not needed.")


def test_a_load_whose_backend_dies_ends_with_its_last_words(node: Node) -> None:
    replica_id = node.begun("load_ms:100000")
    (backend,) = [each for each in node.process(replica_id).children() if "server.py" in each.cmdline()]
    backend.kill()
    reason = node.hears(replica_id, "failed")
    assert reason.startswith("the backend could not load the model: ")
    assert node.ended(replica_id) == ("failed", reason)


def test_a_load_that_redis_loses_is_put_back_and_done(node: Node) -> None:
    replica_id = node.begun("load_ms:8000")
    node.redis.flushall()
    assert wait_for(lambda: node.leases.held(names.replica_queue(replica_id)))
    node.hears(replica_id, "ready")
    assert node.ended(replica_id) == ("done", "")
    assert set(node.said(replica_id)[0]) == {1}


def test_a_load_whose_lease_was_lost_goes_on_with_another(node: Node) -> None:
    replica_id = node.begun("load_ms:8000")
    line = names.replica_queue(replica_id)
    node.redis.zadd(names.leases_key(line), {replica_id: 1}, xx=True)
    assert node.leases.requeue_expired(line) == {replica_id: 1}
    node.hears(replica_id, "ready")
    assert node.ended(replica_id) == ("done", "")
    assert set(node.said(replica_id)[0]) == {1, 2}


def make_log(home: Path, name: str, age: float) -> None:
    path = home / "logs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    os.utime(path, (time.time() - age,) * 2)


def test_logs_are_kept_of_the_twenty_replicas_that_failed_last(tmp_path: Path) -> None:
    for age in range(25):
        for kind in ("replica-r{}.log", "backend-r{}.log", "backend-r{}.1.log"):
            make_log(tmp_path, kind.format(age), age)
    make_log(tmp_path, "jobs.log", 99)
    leftovers.limit_logs(tmp_path, {"r24"})
    names_left = {path.name for path in (tmp_path / "logs").iterdir()}
    kept = [*range(20), 24]  # the last one runs
    assert {name for name in names_left if name.startswith("replica")} == {f"replica-r{age}.log" for age in kept}
    assert len(names_left) == len(kept) * 3 + 1


def test_a_node_that_starts_clears_what_the_one_before_it_left(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("replica-r1.json", ".replica-r1.json.abcd", "r1.sock", "jobs.json"):
        (tmp_path / "run" / name).write_text("a password")
    for age in range(25):
        make_log(tmp_path, f"job-j{age}.log", age)
        make_log(tmp_path, f"replica-r{age}.log", age)
    Children(tmp_path, print, drain_timeout=1.0)
    assert list((tmp_path / "run").iterdir()) == []
    assert len(list((tmp_path / "logs").iterdir())) == 40


def test_the_holder_of_files_tells_its_address_and_is_started_again(node: Node) -> None:
    node.children.start_holder(node.spec().model_copy(update={"api_url": "http://127.0.0.1:9"}))
    assert wait_for(node.children.files)
    first = node.children._holder
    assert re.fullmatch(r"127\.0\.0\.1:\d+", node.children.files()["files_address"])
    assert node.children.files()["transfers"] == 0
    first.process.kill()
    assert wait_for(lambda: node.children._holder is not first and node.children.files())


def test_what_ends_at_once_is_started_again_more_and_more_seldom() -> None:
    pauses = [0.0]
    for _ in range(9):
        pauses.append(module._pause(pauses[-1], 0.5))
    assert pauses[1:] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert module._pause(60.0, 61.0) == 1.0


def test_a_replica_keeps_the_version_that_it_began_with(node: Node, tmp_path: Path) -> None:
    root = tmp_path / "backends"
    old = install_backend(catalog.backend("echo"), root, lambda _: None)
    replica_id = node.start(backend=versions.pointer(root, "echo"))
    node.hears(replica_id, "ready")
    new = install_backend(catalog.backend("echo"), root, lambda _: None, force=True)
    assert (old / "server.py").is_file()
    assert str(old) in " ".join(arguments_of(node.process(replica_id)))
    node.children.stop_replica(replica_id)
    node.hears(replica_id, "gone")
    versions.tidy(root)
    assert (old.exists(), new.exists()) == (False, True)
