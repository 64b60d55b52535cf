"""What those who wait are told: reads the lines, the registry and the journals of the stages that are under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from localai_q import names
from localai_q.bus import journal
from localai_q.cluster.events import Progress
from localai_q.cluster.models import Model
from localai_q.cluster.routing import Snapshot
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.cluster.waiting import Load, Standing, expected_wait, failure_of, load_of
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services


def standings(
    services: Services, snapshots: Snapshots, jobs: Mapping[str, str], pace: Mapping[str, float]
) -> dict[str, Standing]:
    """Where those of these jobs stand that wait, by their ids.

    Args:
        jobs: the names of their models, by their ids.
        pace: seconds that a request takes, by model.
    """
    if not jobs:
        return {}
    snapshot = snapshots.now()
    known = {name: snapshot.models[name] for name in set(jobs.values()) if name in snapshot.models}
    loads = {name: load(services, snapshot, model) for name, model in known.items()}
    slots = {name: _slots(snapshot, model) for name, model in known.items()}
    lines = {job_id: names.model_queue(known[name].id) for job_id, name in jobs.items() if name in known}
    found = {}
    for job_id, place in services.leases.places(lines).items():
        name = jobs[job_id]
        wait = expected_wait(place, slots[name], pace.get(name))
        found[job_id] = Standing(place=place, seconds=wait, load=loads[name])
    return found


def load(services: Services, snapshot: Snapshot, model: Model) -> Load | None:
    """How far the model is; None when it is loaded, or nothing loads it."""
    own = snapshot.of_model.get(model.id, [])
    stages = [replica.job_id for replica in own if replica.job_id and replica.state in COMING_UP]
    newest = journal.latest(services.redis, stages)
    progress = {job_id: event for job_id, event in newest.items() if isinstance(event, Progress)}
    return load_of(model, own, snapshot.node_names, progress, snapshot.speeds, snapshot.taken)


def status(services: Services, snapshot: Snapshot, model: Model) -> dict[str, Any]:
    """`loading`, as `Load.body` has it, and the last `failure`; each None where there is none."""
    failure = failure_of(snapshot.of_model.get(model.id, []), snapshot.node_names)
    found = load(services, snapshot, model)
    return {"loading": found.body() if found else None, "failure": asdict(failure) if failure else None}


def _slots(snapshot: Snapshot, model: Model) -> int:
    return sum(r.slots for r in snapshot.of_model.get(model.id, []) if r.state is ReplicaState.READY)
