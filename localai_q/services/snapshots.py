"""The registry as a web process last read it: fresh to half a second, so that routing costs no query.

Where there is so much in it that reading it takes long, it is read more seldom, and only who reads it waits for it.
While requests come, that is a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time

from localai_q.cluster.models import Model
from localai_q.cluster.routing import Snapshot
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.states import COMING_UP, NodeState
from localai_q.errors import ModelNotFound
from localai_q.services.wiring import Services
from localai_q.store import measures, models, nodes, replicas
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

FRESH = 0.5  # seconds, at least
STALE = 10.0  # seconds, at most
SILENT = (NodeState.UNHEALTHY, NodeState.OFFLINE)
KEPT = 30.0  # seconds after the last request for which it is read ahead
AHEAD = 0.8  # part of the time for which it lasts, after which it is read anew
COSTLY = 4  # times the work of reading it, in seconds: a process has other things to do


class Snapshots:
    """Reads the registry at most every `FRESH` seconds, unless somebody needs it younger."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._last: Snapshot | None = None
        self._read = 0.0  # when, by this process's clock
        self._lock = threading.Lock()
        self._lasts = FRESH  # seconds
        self._asked = time.monotonic()
        self._work = threading.Event()
        self._stopping = False

    def start(self) -> None:
        """Read ahead of those who ask, so that none of them waits for it, until nobody has asked for `KEPT` seconds."""
        threading.Thread(target=self._keep, name="snapshots", daemon=True).start()

    def stop(self) -> None:
        """Read nothing ahead any more: this process ends."""
        self._stopping = True
        self._work.set()

    def now(self, *, younger_than: float | None = None) -> Snapshot:
        """A snapshot: not older than so many seconds, or as old as may be."""
        last, asked = self._last, time.monotonic()
        lasts = self._lasts if younger_than is None else younger_than
        self._asked = asked
        self._work.set()
        if last and asked - self._read < lasts:
            return last
        if not self._lock.acquire(blocking=last is None or younger_than is not None):
            assert last is not None
            return last
        try:
            # What somebody else has read meanwhile will do, if he began when this was asked for.
            if self._last is None or asked - self._read >= lasts:
                return self._look()
            return self._last
        finally:
            self._lock.release()

    def _look(self) -> Snapshot:
        read, began = time.monotonic(), time.process_time()
        found = take(self._services)
        work = time.process_time() - began  # no more: a store that is slow to answer is asked as often as ever
        self._last, self._read, self._lasts = found, read, min(max(FRESH, COSTLY * work), STALE)
        return found

    def _keep(self) -> None:
        while not self._stopping:
            self._work.wait()
            self._work.clear()
            while time.monotonic() - self._asked < KEPT and not self._stopping:
                time.sleep(AHEAD * self._lasts)
                try:
                    with self._lock:
                        self._look()
                except Exception as error:  # noqa: BLE001  (whatever it is, who asks will hear of it)
                    log.info("the registry cannot be read ahead at the moment: %s", error)

    def model(self, name: str, *, younger_than: float | None = None) -> tuple[Model, Snapshot]:
        """The model of that name, and the snapshot that has it; `younger_than` is as in `now`.

        Raises:
            ModelNotFound: there is none, even now.
        """
        snapshot = self.now(younger_than=younger_than)
        if name not in snapshot.models:
            snapshot = self.now(younger_than=0.0)
        if name not in snapshot.models:
            known = ", ".join(sorted(snapshot.models)[:20]) or "none"
            raise ModelNotFound(f"The model '{name}' does not exist. Models here: {known}.", param="model")
        return snapshot.models[name], snapshot


def take(services: Services) -> Snapshot:
    """The registry as it is now."""
    with services.db.transaction() as db:
        known, what = models.every(db), replicas.every(db)
        coming = {replica.node_id for replica in what if replica.state in COMING_UP}
        machines = nodes.states(db)
        return Snapshot(
            models={model.name: model for model in known},
            replicas=tuple(what),
            speeds=Speeds(measures.every(db, node_ids=coming), known) if coming else Speeds(),
            node_names={node_id: name for node_id, (name, _) in machines.items()},
            silent=frozenset(node_id for node_id, (_, state) in machines.items() if state in SILENT),
            taken=clock(db),
        )
