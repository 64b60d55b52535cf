"""The registry as a web process last read it: fresh to half a second, so that routing costs no query."""

from __future__ import annotations

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

FRESH = 0.5  # seconds


class Snapshots:
    """Reads the registry at most every `FRESH` seconds."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._last: Snapshot | None = None
        self._read = 0.0  # when, by this process's clock
        self._lock = threading.Lock()

    def now(self, *, younger_than: float = FRESH) -> Snapshot:
        """A snapshot not older than so many seconds."""
        last = self._last
        if last and time.monotonic() - self._read < younger_than:
            return last
        with self._lock:
            if self._last is last:
                read = time.monotonic()
                self._last = take(self._services)
                self._read = read
            assert self._last is not None
            return self._last

    def model(self, name: str, *, younger_than: float = FRESH) -> tuple[Model, Snapshot]:
        """The model of that name, and the snapshot that has it, not older than so many seconds.

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
        machines = nodes.every(db)
        return Snapshot(
            models={model.name: model for model in known},
            replicas=tuple(what),
            speeds=Speeds(measures.every(db, node_ids=coming), known) if coming else Speeds(),
            node_names={node.id: node.name for node in machines},
            silent=frozenset(node.id for node in machines if node.state in (NodeState.UNHEALTHY, NodeState.OFFLINE)),
            taken=clock(db),
        )
