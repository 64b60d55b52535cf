"""The node's children: replicas and the jobs worker. Owns starting, watching and ending them, and what they report.

A child dies with the node (`localai_q.processes.spawn`). On Linux the parent-death signal is bound to the spawning
thread, so all are spawned from one daemon thread, which the interpreter keeps until the very end; a thread pool's would
end before the children have been given their time to finish.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from localai_q import names
from localai_q.config import child_environment
from localai_q.processes import kill_group, spawn, tail, wait_for_end
from workers.child import ChildSpec, read_statuses, write_spec

log = logging.getLogger(__name__)

LAST_LINES = 8
RESTART = 1.0  # seconds before the jobs worker is started again

Process = subprocess.Popen[bytes]
Report = Callable[[str, str, str], None]  # replica id, state, reason


@dataclass
class Child:
    """A running child process."""

    name: str
    process: Process
    log: Path
    state: str = "loading"
    reason: str = ""
    stopping: bool = False


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

    def __init__(self, home: Path, report: Report) -> None:
        self._home = home
        self._report = report
        self._replicas: dict[str, Child] = {}
        self._jobs: Child | None = None
        self._lock = threading.Lock()
        self._spawner = Spawner()
        self.stopping = False

    def running(self) -> dict[str, str]:
        """The state of every replica that has a process, by id."""
        with self._lock:
            return {replica_id: child.state for replica_id, child in self._replicas.items()}

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
                child = self._spawn(name, f"replica-{replica_id}", queues, spec, self._watch_replica(replica_id))
                self._replicas[replica_id] = child
        if known:
            self._report(replica_id, known.state, known.reason)

    def stop_replica(self, replica_id: str) -> None:
        """Have a replica finish what it holds and end."""
        with self._lock:
            child = self._replicas.get(replica_id)
        if child is None:
            self._report(replica_id, "gone", "")
            return
        child.stopping = True
        child.process.terminate()

    def start_jobs_worker(self, spec: ChildSpec) -> None:
        """Start the worker that does this node's long jobs, and keep it running."""

        def watch(child: Child, _: int) -> None:
            if self.stopping or child.stopping:
                return
            log.error("the jobs worker ended: %s", tail(child.log, LAST_LINES))
            time.sleep(RESTART)
            self.start_jobs_worker(spec)

        queue = names.node_jobs_queue(spec.node_id)
        with self._lock:
            if not self.stopping:
                self._jobs = self._spawn(f"jobs@{spec.node_name}", "jobs", queue, spec, watch)

    def stop_all(self, grace: float) -> None:
        """End every child: asked first, killed after so many seconds."""
        with self._lock:
            self.stopping = True
            children = [*self._replicas.values(), *([self._jobs] if self._jobs else [])]
        for child in children:
            child.stopping = True
            child.process.terminate()
        deadline = time.monotonic() + grace
        for child in children:
            wait_for_end(child.process, max(deadline - time.monotonic(), 0.0))
            kill_group(child.process)

    def _spawn(
        self, name: str, file: str, queues: str, spec: ChildSpec, on_exit: Callable[[Child, int], None]
    ) -> Child:
        read_end, write_end = os.pipe()
        spec_path = self._home / "run" / f"{file}.json"
        write_spec(spec_path, spec.model_copy(update={"status_fd": write_end}))
        celery = str(Path(sys.executable).with_name("celery"))
        command = [celery, "-A", "localai_q", "worker", "-Q", queues, "-n", name, "--loglevel", "INFO"]
        env = child_environment(LOCALAI_Q_CHILD_SPEC=str(spec_path), LOCALAI_REGISTRATION_TOKEN="")
        path = self._home / "logs" / f"{file}.log"
        try:
            process = self._spawner.run(lambda: spawn(command, env=env, log=path, pass_fds=(write_end,)))
            child = Child(name=name, process=process, log=path)
        finally:
            os.close(write_end)
        threading.Thread(target=self._follow, args=(child, read_end, on_exit), name=name, daemon=True).start()
        return child

    def _follow(self, child: Child, read_end: int, on_exit: Callable[[Child, int], None]) -> None:
        for said in read_statuses(read_end):
            child.state, child.reason = str(said.get("state")), str(said.get("reason", ""))
            log.info("%s: %s %s", child.name, child.state, child.reason)
            self._on_status(child)
        on_exit(child, child.process.wait())

    def _on_status(self, child: Child) -> None:
        with self._lock:
            found = next((key for key, value in self._replicas.items() if value is child), None)
        if found and child.state == "ready" and not child.stopping:
            self._report(found, "ready", "")

    def _watch_replica(self, replica_id: str) -> Callable[[Child, int], None]:
        def watch(child: Child, code: int) -> None:
            with self._lock:
                self._replicas.pop(replica_id, None)
            if self.stopping:
                return
            if child.stopping:
                self._report(replica_id, "gone", "")
                return
            reason = child.reason or f"the replica ended with exit code {code}: {tail(child.log, LAST_LINES)}"
            log.error("%s failed: %s", child.name, reason)
            self._report(replica_id, "failed", reason)

        return watch
