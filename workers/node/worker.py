"""The node role of a Celery worker: `celery -A localai_q worker`, with two settings and nothing else.

It registers before it consumes, because registration tells it which broker and which queue are its own.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from celery import signals

from localai_q import names
from localai_q.celery import app, use_broker
from localai_q.config import Settings, settings
from localai_q.errors import Forbidden, LocalAIError, NotFound, StartupError
from workers import versions
from workers.child import ChildSpec, ModelSpec, ReplicaSpec
from workers.identity import Identity
from workers.node import api, hardware
from workers.node.children import Children

log = logging.getLogger(__name__)

CONCURRENCY = 4  # short work at once
REPORT_TRIES = 60  # one a second
LONGEST_FOLDER = 80  # bytes; a socket's own name has 21
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")  # as the API has it


class Node:
    """This machine, registered."""

    def __init__(self, cfg: Settings, answer: dict[str, Any], identity: Identity) -> None:
        self.id: str = answer["id"]
        self.name: str = answer["name"]
        self.home = cfg.node_home
        self.models = cfg.models_path or self.home / "models"
        self.backends = cfg.backends_of_node
        self._sockets = socket_folder(self.home)
        self._cfg = cfg
        self._answer = answer
        self._identity = identity
        self._api = api.NodeApi(cfg.api_of_node, self.id, identity)
        self._stopping = threading.Event()
        self._member = True
        self.children = Children(self.home, self._report, drain_timeout=cfg.drain_timeout)

    def start(self) -> None:
        """Begin to report and to do jobs."""
        self.children.start_jobs_worker(self._spec(None))
        self.children.start_holder(self._spec(None))
        threading.Thread(target=self._heartbeats, name="heartbeat", daemon=True).start()

    def start_replica(self, replica_id: str) -> None:
        """Start one of this node's replicas; what should not run any more is left alone."""
        try:
            told = self._api.replica(replica_id)
        except NotFound as error:
            log.info("replica %s is not to be started: %s", replica_id, error.message)
            return
        try:
            self.children.start_replica(self._spec(self._replica(told)))
        except (LocalAIError, OSError, ValueError) as error:
            self._report(replica_id, "failed", f"the node cannot start it: {error}")

    def stop_replica(self, replica_id: str) -> None:
        self.children.stop_replica(replica_id)

    def stop(self) -> None:
        """End the children and leave the cluster."""
        self._stopping.set()
        self.children.stop_all(self._cfg.drain_timeout + 1.0)
        if not self._member:
            return
        try:
            self._api.deregister()
        except LocalAIError as error:
            log.warning("could not say goodbye: %s", error.message)

    def _heartbeats(self) -> None:
        while not self._stopping.is_set():
            pause = float(self._answer["heartbeat"])
            self.children.changed.clear()
            try:
                answer = self._api.heartbeat(self._hardware(), self.children.reports())
                for replica_id in answer.get("stop", []):
                    self.children.stop_replica(replica_id)
                if self._renew_secret(asked=bool(answer.get("rotate"))):
                    pause = 0.0
            except Forbidden:
                self._removed()
            except (LocalAIError, OSError) as error:
                log.warning("heartbeat: %s", error)
            except Exception:
                log.exception("heartbeat: it is tried again")
            self.children.changed.wait(pause)

    def _renew_secret(self, *, asked: bool) -> bool:
        """After a heartbeat: go on to a new secret when that is due, which the next heartbeat uses. Whether it was."""
        self._identity.settle()
        if not (asked or self._identity.begun or self._identity.older_than(self._cfg.secret_days)):
            return False
        self._api.announce_secret(self._identity.prepare())
        self._identity.adopt()
        log.info("this node has made itself a new secret")
        return True

    def _removed(self) -> None:
        """The API knows this node no more: end, as on SIGTERM."""
        self._stopping.set()
        log.error("this node was removed from the cluster and ends; start it again to have it ask to join anew")
        self._member = False
        os.kill(os.getpid(), signal.SIGTERM)

    def _report(self, replica_id: str, state: str, reason: str) -> None:
        """Say what became of a replica, as often as it takes."""
        for _ in range(REPORT_TRIES):
            try:
                return self._api.report(replica_id, state, reason, self._hardware())
            except NotFound:
                return None
            except LocalAIError as error:
                log.warning("replica %s is %s, which cannot be reported yet: %s", replica_id, state, error.message)
                time.sleep(1.0)
        return None

    def _hardware(self) -> dict[str, Any]:
        return reading(self._cfg) | self.children.files()

    def _spec(self, replica: ReplicaSpec | None) -> ChildSpec:
        shared = {
            name: self._answer[name] for name in ("redis_url", "lease", "journal_ttl", "journal_max", "load_stall")
        }
        return ChildSpec(
            node_id=self.id,
            node_name=self.name,
            status_fd=-1,
            backends=self.backends,
            models=self.models,
            api_url=self._cfg.api_of_node,
            identity=self._identity.path,
            replica=replica,
            **shared,
        )

    def _replica(self, told: dict[str, Any]) -> ReplicaSpec:
        model = ModelSpec.model_validate(told["model"])
        return ReplicaSpec(
            id=told["id"],
            number=told["number"],
            job=told["job"],
            gpu=told["gpu"],
            model=model,
            backend_folder=versions.pointer(self.backends, model.backend),
            blobs=self.models / "blobs",
            socket=self._sockets / f"{told['id']}.sock",
            log=self.home / "logs" / f"backend-{told['id']}.log",
        )


def prepare(worker: Any, conf: Any) -> None:
    """Register, and make the worker this machine's node."""
    cfg = settings()
    if not cfg.api_of_node or not cfg.registration_token:
        raise StartupError(
            "set LOCALAI_REGISTER_TO (the API's URL) and LOCALAI_REGISTRATION_TOKEN to join a cluster; "
            "'localai-q up' prints both when it starts"
        )
    check_name(cfg.effective_node_name)
    identity = Identity(cfg.node_home / "identity.json")
    hold_home(cfg.node_home)
    logging.basicConfig(level=cfg.log_level, format="%(asctime)s %(levelname)s %(message)s")
    answer = api.register(cfg.api_of_node, cfg.registration_token, cfg.effective_node_name, identity, reading(cfg))
    node = Node(cfg, answer, identity)
    use_broker(conf, answer["redis_url"], node.id, identity.secret)
    consume(names.node_queue(node.id), conf)
    conf.worker_concurrency = CONCURRENCY
    worker.hostname = f"node@{node.name}"
    register_tasks(node)
    signals.worker_ready.connect(lambda **_: node.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: threading.Thread(target=node.stop).start(), weak=False)


def reading(cfg: Settings) -> dict[str, Any]:
    """What the node says of its machine and of what that may hold."""
    found = hardware.read(cfg.models_path or cfg.node_home / "models", cfg.budget_of, cfg.builds)
    limits = {"max_replicas_per_model": cfg.max_replicas_per_model, "disk_spare": cfg.disk_spare}
    return {**found, **limits, "backends": versions.installed(cfg.backends_of_node)}


def check_name(name: str) -> None:
    """Refuse a name that the API would refuse, before a folder is called so.

    Raises:
        StartupError: it is no name.
    """
    if not NAME.fullmatch(name):
        raise StartupError(
            f"a node cannot be called {name!r}: set LOCALAI_NODE_NAME to at most 63 letters, digits, '_', '-' and '.', "
            "of which the first is a letter or a digit"
        )


def hold_home(home: Path) -> None:
    """Hold the node's folder for as long as this process lives.

    Raises:
        StartupError: another process is this node already.
    """
    descriptor = os.open(home / "node.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StartupError(
            f"a node runs in {home} already: stop that one, or give this one a name of its own with LOCALAI_NODE_NAME"
        ) from error


def socket_folder(home: Path) -> Path:
    """A private folder whose path is short enough for a Unix socket in it (107 bytes in all on Linux, 103 on macOS)."""
    folder = home / "run"
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        return folder
    short = tempfile.mkdtemp(prefix="localai_q-")
    atexit.register(shutil.rmtree, short, ignore_errors=True)
    return Path(short)


def consume(queue: str, conf: Any) -> None:
    """Have the worker consume this queue. `task_queues` would come too late here."""
    conf.task_default_queue = queue
    app.amqp.queues.select([queue])


def register_tasks(node: Node) -> None:
    """The tasks of a node."""

    @app.task(name=names.START_REPLICA)
    def start_replica(replica_id: str) -> None:
        node.start_replica(replica_id)

    @app.task(name=names.STOP_REPLICA)
    def stop_replica(replica_id: str) -> None:
        node.stop_replica(replica_id)
