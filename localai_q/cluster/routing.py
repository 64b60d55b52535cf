"""Which line a request joins. Pure: a snapshot of the registry and a request go in, a route with a reason comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from localai_q import names
from localai_q.cluster.capacity import cooling
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica
from localai_q.cluster.placement import hopeless
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.errors import ModelUnavailable, UnsupportedByModel


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the registry held a moment ago."""

    models: dict[str, Model]  # by name
    replicas: tuple[Replica, ...]
    node_names: dict[str, str]  # by id
    speeds: Speeds = field(default_factory=Speeds)  # on nodes where something comes up
    taken: float  # seconds since the epoch


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a request waits, and whether something must be loaded for it."""

    queue: str
    needs_load: bool
    reason: str


def route(model: Model, replicas: Sequence[Replica], kind: str, now: float) -> Route:
    """The route of a request of this kind (chat, completion, embedding …).

    Raises:
        UnsupportedByModel: the model does not serve that kind.
        ModelUnavailable: it failed to load a moment ago, and will not be tried again just yet.
    """
    if kind not in model.config.tasks:
        serves = ", ".join(sorted(model.config.tasks))
        raise UnsupportedByModel(f"The model '{model.name}' does not serve {kind} requests; it serves {serves}.",
                                 param="model")  # fmt: skip
    own = [replica for replica in replicas if replica.model_id == model.id]
    queue = names.model_queue(model.id)
    ready = sum(replica.state is ReplicaState.READY for replica in own)
    if ready:
        return Route(queue=queue, needs_load=False, reason=f"{ready} replicas ready")
    if any(replica.state in COMING_UP for replica in own):
        return Route(queue=queue, needs_load=False, reason="a replica is coming up")
    failed = [replica for replica in own if hopeless(replica) and cooling(replica, now)]
    if failed:
        raise ModelUnavailable(f"The model '{model.name}' could not be loaded: {failed[-1].reason}")
    return Route(queue=queue, needs_load=True, reason="nothing is loaded")
