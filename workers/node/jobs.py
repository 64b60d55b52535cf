"""The jobs role of a Celery worker: a node's long work, each piece in a child process that a cancellation can kill."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from celery import signals

from localai_q import names
from localai_q.bus.connection import client
from localai_q.bus.leases import Leases, Refusal
from localai_q.bus.probe import Probe
from localai_q.celery import app, use_broker
from localai_q.cluster.events import End, Progress
from localai_q.cluster.jobs import is_pause
from localai_q.cluster.states import JobState
from localai_q.config import child_environment, settings, write_private
from localai_q.errors import GenerationFailed, LocalAIError, to_record
from localai_q.processes import has_ended, kill_group, spawn, tail, wait_for_end, watch_parent
from workers import versions
from workers.child import CHANGED, ChildSpec, StatusPipe, read_spec, read_statuses
from workers.claims import Claims, Held
from workers.identity import Identity
from workers.node import leftovers
from workers.node.job_child import DISCARD, PRESENT, JobOrder
from workers.node.stalls import LOOK, Watch
from workers.node.store import Store

log = logging.getLogger(__name__)

CONCURRENCY = 2
DEATHS = 3
TIDY = 60.0  # seconds between two looks for versions of backends that nobody uses any more


class Jobs:
    """Does this node's long jobs."""

    def __init__(self, spec: ChildSpec, identity: Identity, folder: Path) -> None:
        redis = client(spec.redis_url, identity.secret)
        leases = Leases(redis, lease=spec.lease, journal_ttl=spec.journal_ttl, journal_max=spec.journal_max)
        self.claims = Claims(redis, leases, owner=f"jobs-{names.new_id()}", node_id=spec.node_id, lease=spec.lease)
        self._spec = spec
        self._folder = folder
        self._line = names.node_jobs_queue(spec.node_id)
        leftovers.clear_scratch(spec.node_id)

    def run(self, job_id: str) -> None:
        """Do the job in a child process, if it is to be had."""
        held = self.claims.claim(job_id, self._line)
        if isinstance(held, Refusal):
            log.info("job %s is not to be had: %s", job_id, held.why)
            return
        if held.lease.deaths >= DEATHS:
            held.finish(_failed(f"{held.lease.deaths} tries at this job died"))
            return
        try:
            end = self._present(held.lease.request) or self._done_in_child(held)
        except OSError as error:
            end = _failed(f"the node cannot start it: {error}")
        except LocalAIError as error:
            end = End(state=JobState.FAILED, error=to_record(error))
        if held.cancelled.is_set() and held.why != "cancelled":
            held.release()
        else:
            held.finish(end)

    def _present(self, request: dict[str, Any]) -> End | None:
        """The end of a job whose result lies on this node already."""
        check = PRESENT.get(str(request.get("kind")))
        result = check(self._spec, request) if check else None
        return End(state=JobState.DONE, result=result) if result else None

    def _done_in_child(self, held: Held) -> End:
        """The end of a job of which nothing temporary stays, whatever becomes of its process."""
        prefix = leftovers.scratch(self._spec.node_id)
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as scratch:
            return self._in_child(held, scratch)

    def _in_child(self, held: Held, scratch: str) -> End:
        job_id = held.lease.job_id
        order = self._folder / f"job-{job_id}.{secrets.token_hex(4)}.json"
        path = self._folder.parent / "logs" / f"job-{job_id}.log"
        read_end, write_end = os.pipe()
        try:
            write_private(order, JobOrder(spec=self._spec, request=held.lease.request, fd=write_end).model_dump_json())
            env = child_environment(LOCALAI_Q_CHILD_SPEC=str(order), TMPDIR=scratch)
            command = [sys.executable, "-m", "workers.node.job_child"]
            process = spawn(command, env=env, log=path, pass_fds=(write_end,), death_signal=signal.SIGTERM)
        except BaseException:
            os.close(read_end)
            order.unlink(missing_ok=True)
            raise
        finally:
            os.close(write_end)
        held.on_cancel(lambda: kill_group(process))
        watch = Watch(process.pid, self._spec.load_stall)
        stalled = _kill_when_stalled(process, watch)
        end = None
        for said in read_statuses(read_end):
            end = _end_of(said) or end
            if "progress" in said:
                progress = Progress(**said["progress"])
                watch.note(progress)
                held.emit(progress)
        wait_for_end(process, math.inf)
        code = kill_group(process)
        order.unlink(missing_ok=True)
        if held.cancelled.is_set():
            return self._stopped(held)
        if end is None and stalled.is_set():
            return _failed(str(watch))
        if end is None:
            return _failed(f"the job's process ended with exit code {code}: {tail(path, 8)}")
        with contextlib.suppress(OSError):
            path.unlink()
        return end

    def _stopped(self, held: Held) -> End:
        """The end of a job that was cancelled, which leaves nothing, or paused; of none that is given back."""
        if held.why != "cancelled":
            return _failed("it is given back")
        end = held.asked()
        if not is_pause(end.error):
            self._discard(held.lease.request)
        return end

    def _discard(self, request: dict[str, Any]) -> None:
        """Remove what a cancelled job has left: one that is only given back goes on with it."""
        discard = DISCARD.get(str(request.get("kind")))
        if discard:
            discard(self._spec, request)


def prepare(worker: Any, conf: Any) -> None:
    """Make the worker the one that does its node's jobs."""
    spec = read_spec()
    watch_parent(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    identity = Identity(spec.identity)
    use_broker(conf, spec.redis_url, spec.node_id, identity.secret)
    conf.worker_concurrency = CONCURRENCY
    folder = settings().child_spec
    assert folder is not None
    status = StatusPipe(spec.status_fd)
    jobs = Jobs(spec, identity, folder.parent)
    probe = Probe(app, client(spec.redis_url, identity.secret), names.node_jobs_queue(spec.node_id), slots=CONCURRENCY)

    @app.task(name=names.RUN_JOB)
    def run_job(job_id: str) -> None:
        jobs.run(job_id)
        status.say(CHANGED)

    threading.Thread(target=_tidy, args=(spec.backends, spec.models), name="tidy", daemon=True).start()
    signals.worker_ready.connect(lambda **_: status.say("ready"), weak=False)
    signals.worker_ready.connect(lambda **_: probe.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: probe.stop(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: jobs.claims.cancel_all("drain"), weak=False)


def _tidy(backends: Path, models: Path) -> None:
    """Remove what interrupted jobs have left, and what nobody runs any more, from time to time."""
    while True:
        versions.tidy(backends)
        Store(models).remove_forgotten()
        time.sleep(TIDY)


def _kill_when_stalled(process: subprocess.Popen[bytes], watch: Watch) -> threading.Event:
    """Kill the process, with all that it has started, once nothing moves; set when that was done."""
    stalled = threading.Event()

    def look() -> None:
        while not has_ended(process):
            time.sleep(LOOK)
            if watch.look():
                stalled.set()
                kill_group(process)

    threading.Thread(target=look, name="stall", daemon=True).start()
    return stalled


def _end_of(said: dict[str, Any]) -> End | None:
    if "result" in said:
        return End(state=JobState.DONE, result=said["result"])
    if "error" in said:
        return End(state=JobState.FAILED, error=said["error"])
    return None


def _failed(message: str) -> End:
    return End(state=JobState.FAILED, error=to_record(GenerationFailed(message)))
