"""The node's children: replicas, the jobs worker and the holder of files. Owns starting, watching and ending them, and what they report.

A child dies with the node (`localai_q.processes.spawn`). On Linux the parent-death signal is bound to the spawning
thread, so all are spawned from one daemon thread, which the interpreter keeps until the very end; a thread pool's would
end before the children have been given their time to finish.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localai_q import names
from localai_q.config import child_environment
from localai_q.processes import kill_group, spawn, tail, wait_for_end
from workers.child import ALIVE, CHANGED, FINISH, ChildSpec, ReplicaSpec, read_statuses, write_spec
from workers.node import leftovers
from workers.node.stalls import BUSY, LOOK, Watch, longest

log = logging.getLogger(__name__)

LAST_LINES = 8
RESTART = 1.0  # seconds before a child that is always there is started again, doubled while it ends at once
LONGEST_RESTART = 60.0
SILENCE = 30.0  # seconds after which a child that was ready and says nothing counts as hanging
LAST_PATIENCE = 5.0  # seconds that a replica which was stopped while it loaded has to end, beyond those for jobs

Process = subprocess.Popen[bytes]
Report = Callable[[str, str, str], None]  # replica id, state, reason


@dataclass
class Load:
    """A model on its way into memory."""

    watch: Watch
    longest: float  # seconds that it may take without a sign that it moves
    busiest: float  # seconds that it may work without reading anything
    log: Path  # of the backend

    def verdict(self) -> str:
        """Why it must end, `LOOK` seconds after this was asked last; empty as long as it may go on."""
        stalled = self.watch.look() and self.watch.elapsed > self.longest
        if not stalled and self.watch.unread <= self.busiest:
            return ""
        how = f"{self.watch}" if stalled else f"is busy for ever: it has read nothing for {self.watch.unread:.0f} s"
        words = tail(self.log, LAST_LINES).strip()
        why = f"loading {how}, {self.watch.elapsed:.0f} s after it began"
        return f"{why}; the backend's last words: {words}" if words else why


@dataclass
class Child:
    """A running child process."""

    name: str
    process: Process
    log: Path
    state: str = "loading"
    reason: str = ""
    stopping: bool = False
    silent: float = 0.0  # seconds; those in which this process did not look are not counted
    loads: Load | None = None  # of a replica
    replica: ReplicaSpec | None = None  # that it serves
    begun: float = field(default_factory=time.monotonic)
    load_seconds: float = 0.0  # until it was ready
    in_flight: int = 0  # as it said last, like the next
    tokens_per_second: float = 0.0
    files: dict[str, Any] = field(default_factory=dict)  # of the holder: what it says of itself

    def report(self) -> dict[str, Any]:
        """What a replica's process does."""
        assert self.replica is not None
        model = self.replica.model
        return {
            "id": self.replica.id,
            "model_id": model.id,
            "revision": model.revision,
            "number": self.replica.number,
            "state": "stopping" if self.stopping else self.state,
            "slots": model.slots,
            "context_size": model.context_size,
            "gpu": self.replica.gpu,
            "in_flight": self.in_flight,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "load_seconds": round(self.load_seconds, 2),
        }


class Spawner:
    """The one thread that starts processes."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Callable[[], Process], Future[Process]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="spawner", daemon=True).start()

    def run(self, start: Callable[[], Process]) -> Process:
        """Have the thread start a process, and return it or raise what that raised."""
        started: Future[Process] = Future()
        self._orders.put((start, started))
        return started.result()

    def _work(self) -> None:
        while True:
            start, started = self._orders.get()
            try:
                started.set_result(start())
            except OSError as error:
                started.set_exception(error)


class Children:
    """Every child of this node."""

    def __init__(self, home: Path, report: Report, *, drain_timeout: float) -> None:
        leftovers.clear(home)
        self._home = home
        self._drain_timeout = drain_timeout
        self._send = report
        self._reports: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._replicas: dict[str, Child] = {}
        self._jobs: Child | None = None
        self._holder: Child | None = None
        self._pauses: dict[str, float] = {}  # seconds before the last new start, by name
        self._lock = threading.Lock()
        self._spawner = Spawner()
        self.stopping = False
        self.changed = threading.Event()  # what lies on this machine is not what it was
        threading.Thread(target=self._send_reports, name="reports", daemon=True).start()
        threading.Thread(target=self._look, name="hanging", daemon=True).start()

    def reports(self) -> list[dict[str, Any]]:
        """What every replica does that has a process, for `localai_q.cluster.reports.Report`."""
        with self._lock:
            return [child.report() for child in self._replicas.values()]

    def start_replica(self, spec: ChildSpec) -> None:
        """Start a replica's process, unless it runs already; then only say again what it is doing."""
        assert spec.replica is not None
        replica_id, model = spec.replica.id, spec.replica.model
        with self._lock:
            known = self._replicas.get(replica_id)
            if self.stopping:
                return
            if known is None:
                name = f"{model.name}.{spec.replica.number}@{spec.node_name}"
                queues = f"{names.model_queue(model.id)},{names.replica_queue(replica_id)}"
                watch = self._watch_replica(replica_id)
                child = self._spawn(name, f"replica-{replica_id}", _celery(name, queues), spec, watch)
                child.loads = _load_of(child, spec)
                self._replicas[replica_id] = child
            elif not known.stopping:  # else its end is about to be reported
                self._report(replica_id, known.state, known.reason)

    def stop_replica(self, replica_id: str) -> None:
        """Have a replica finish what it holds and end; one that hangs is killed."""
        with self._lock:
            child = self._replicas.get(replica_id)
            if child is None:
                self._report(replica_id, "gone", "")
                return
            if child.stopping:
                return
            child.stopping = True
        if child.state == "ready":
            child.process.send_signal(FINISH)
            return
        child.process.terminate()
        killer = threading.Timer(self._drain_timeout + LAST_PATIENCE, kill_group, (child.process,))
        killer.daemon = True
        killer.start()

    def files(self) -> dict[str, Any]:
        """What the holder says: `files_address` and `transfers`; empty as long as it does not serve."""
        with self._lock:
            return dict(self._holder.files) if self._holder and self._holder.state == "ready" else {}

    def start_jobs_worker(self, spec: ChildSpec) -> None:
        """Start the worker that does this node's long jobs, and keep it running."""
        name = f"jobs@{spec.node_name}"
        command = _celery(name, names.node_jobs_queue(spec.node_id))
        with self._lock:
            if not self.stopping:
                again = self._kept(name, lambda: self.start_jobs_worker(spec))
                self._jobs = self._spawn(name, "jobs", command, spec, again)

    def start_holder(self, spec: ChildSpec) -> None:
        """Start what gives this node's files to other nodes, and keep it running."""
        name = f"files@{spec.node_name}"
        command = [sys.executable, "-m", "workers.node.holder"]
        with self._lock:
            if not self.stopping:
                again = self._kept(name, lambda: self.start_holder(spec))
                self._holder = self._spawn(name, "files", command, spec, again)

    def _kept(self, name: str, start: Callable[[], None]) -> Callable[[Child, int], None]:
        """What starts a child again when it ends."""

        def watch(child: Child, _: int) -> None:
            if self.stopping or child.stopping:
                return
            log.error("%s ended: %s", name, child.reason or tail(child.log, LAST_LINES))
            pause = self._pauses[name] = _pause(self._pauses.get(name, 0.0), time.monotonic() - child.begun)
            while not self.stopping:
                time.sleep(pause)
                try:
                    start()
                except OSError as error:
                    log.error("%s cannot be started: %s", name, error)
                else:
                    return

        return watch

    def stop_all(self, grace: float) -> None:
        """End every child: asked first, killed after so many seconds."""
        with self._lock:
            self.stopping = True
            children = self._all()
        for child in children:
            child.stopping = True
            child.process.terminate()
        deadline = time.monotonic() + grace
        for child in children:
            wait_for_end(child.process, max(deadline - time.monotonic(), 0.0))
            kill_group(child.process)

    def _all(self) -> list[Child]:
        return [*self._replicas.values(), *filter(None, (self._jobs, self._holder))]

    def _spawn(
        self, name: str, file: str, command: list[str], spec: ChildSpec, on_exit: Callable[[Child, int], None]
    ) -> Child:
        spec_path = self._home / "run" / f"{file}.json"
        env = child_environment(LOCALAI_Q_CHILD_SPEC=str(spec_path), LOCALAI_REGISTRATION_TOKEN="")
        path = self._home / "logs" / f"{file}.log"
        read_end, write_end = os.pipe()
        try:
            write_spec(spec_path, spec.model_copy(update={"status_fd": write_end}))
            process = self._spawner.run(lambda: spawn(command, env=env, log=path, pass_fds=(write_end,)))
        except OSError:
            os.close(read_end)
            spec_path.unlink(missing_ok=True)
            raise
        finally:
            os.close(write_end)
        child = Child(name=name, process=process, log=path, replica=spec.replica)

        def follow() -> None:
            self._listen(child, read_end)
            wait_for_end(process, math.inf)
            code = kill_group(process)  # and what a backend leaves that was killed with it
            spec_path.unlink(missing_ok=True)  # of a child that ended before it read that
            on_exit(child, code)

        threading.Thread(target=follow, name=name, daemon=True).start()
        return child

    def _listen(self, child: Child, read_end: int) -> None:
        for said in read_statuses(read_end):
            child.silent = 0.0
            child.in_flight = said.get("in_flight", child.in_flight)
            child.tokens_per_second = said.get("tokens_per_second", child.tokens_per_second)
            child.files = {name: said[name] for name in ("files_address", "transfers") if name in said}
            if said.get("state") == CHANGED:
                self.changed.set()
            if said.get("state") in (ALIVE, CHANGED):
                continue
            if said.get("state") == "ready":
                child.load_seconds = time.monotonic() - child.begun
            child.state, child.reason = str(said.get("state")), str(said.get("reason", ""))
            log.info("%s: %s %s", child.name, child.state, child.reason)
            self._on_status(child)

    def _on_status(self, child: Child) -> None:
        with self._lock:
            found = next((key for key, value in self._replicas.items() if value is child), None)
            if found and child.state == "ready" and not child.stopping:
                self._report(found, "ready", "")

    def _look(self) -> None:
        """Kill every child that hangs; its end is reported as any other's."""
        while True:
            time.sleep(LOOK)
            with self._lock:
                children = self._all()
            for child in children:
                if reason := _hangs(child):
                    child.reason = reason
                    kill_group(child.process)

    def _report(self, replica_id: str, state: str, reason: str) -> None:
        """Have this said to the API after what was to be said before; who says it waits for nobody."""
        self._reports.put((replica_id, state, reason))

    def _send_reports(self) -> None:
        while True:
            report = self._reports.get()
            try:
                self._send(*report)
            except Exception:
                log.exception("replica %s is %s, which could not be reported", *report[:2])

    def _watch_replica(self, replica_id: str) -> Callable[[Child, int], None]:
        def watch(child: Child, code: int) -> None:
            assert child.replica is not None
            leftovers.remove_run(child.replica.socket)
            reason = child.reason or f"the replica ended with exit code {code}: {tail(child.log, LAST_LINES)}"
            if child.stopping:
                leftovers.remove_logs(self._home, replica_id)
            else:
                log.error("%s failed: %s", child.name, reason)
            with self._lock:
                self._replicas.pop(replica_id, None)
                leftovers.limit_logs(self._home, self._replicas)
                if child.stopping and not self.stopping:
                    self._report(replica_id, "gone", "")
                elif not child.stopping:
                    self._report(replica_id, "failed", reason)

        return watch


def _celery(name: str, queues: str) -> list[str]:
    celery = str(Path(sys.executable).with_name("celery"))
    return [celery, "-A", "localai_q", "worker", "-Q", queues, "-n", name, "--loglevel", "INFO"]


def _pause(last: float, lived: float) -> float:
    """Seconds to wait before a child is started again that has lived so long."""
    return RESTART if lived > LONGEST_RESTART else min(max(2 * last, RESTART), LONGEST_RESTART)


def _load_of(child: Child, spec: ChildSpec) -> Load:
    assert spec.replica is not None
    files = map(spec.replica.path_of, spec.replica.model.own)
    size = sum(file.stat().st_size for file in files if file.is_file())
    watch = Watch(child.process.pid, spec.load_stall)
    return Load(watch, longest(size, spec.load_stall), longest(size, BUSY), spec.replica.log)


def _hangs(child: Child) -> str:
    """Why the child counts as hanging, `LOOK` seconds after this was asked last; empty if it does not."""
    if child.state == "ready":
        child.silent += LOOK
        return f"it has hung: nothing was heard of it for {SILENCE:.0f} s" if child.silent > SILENCE else ""
    return child.loads.verdict() if child.loads and child.state == "loading" and not child.stopping else ""
