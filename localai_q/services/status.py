"""Whether the cluster can serve, and numbers about it."""

from __future__ import annotations

from localai_q import names
from localai_q.bus.connection import broker_errors
from localai_q.errors import Unavailable
from localai_q.services.wiring import Services
from localai_q.store import jobs, leaders, models, nodes, replicas

LOOPS_LATE = 15.0  # seconds without a turn after which control counts as absent


def readiness(services: Services) -> dict[str, str]:
    """For the database, the broker and control's loops: "ok", or what is wrong."""
    found: dict[str, str] = {}
    try:
        with services.db.transaction() as db:
            ages = leaders.ages(db)
        found["database"] = "ok"
        late = {loop: age for loop, age in ages.items() if age > LOOPS_LATE}
        found["control"] = "ok" if ages and not late else f"no turn lately: {late or 'never started'}"
    except Unavailable as error:
        found["database"] = error.message
    try:
        with broker_errors():
            services.redis.ping()
        found["broker"] = "ok"
    except Unavailable as error:  # in our words: the driver's name addresses, and anybody may ask
        found["broker"] = error.message
    return found


def gauges(services: Services) -> dict[str, dict[tuple[str, ...], float]]:
    """Numbers for Prometheus by metric name and label values."""
    with services.db.transaction() as db:
        ended = jobs.counts(db)
        where = nodes.every(db)
        what = replicas.every(db)
        known = models.every(db)
    by_id = {model.id: model.name for model in known}
    waiting: dict[tuple[str, ...], float] = {}
    running: dict[tuple[str, ...], float] = {}
    for model in known:
        line = names.model_queue(model.id)
        waiting[(model.name,)] = services.redis.zcard(names.waiting_key(line))
        running[(model.name,)] = services.redis.zcard(names.leases_key(line))
    replica_counts: dict[tuple[str, ...], float] = {}
    for replica in what:
        labels = (by_id.get(replica.model_id, ""), replica.state.value)
        replica_counts[labels] = replica_counts.get(labels, 0) + 1
    node_counts: dict[tuple[str, ...], float] = {}
    for node in where:
        node_counts[(node.state.value,)] = node_counts.get((node.state.value,), 0) + 1
    return {
        "localai_jobs": {(kind, state): count for (kind, state), count in ended.items()},
        "localai_nodes": node_counts,
        "localai_replicas": replica_counts,
        "localai_jobs_waiting": waiting,
        "localai_jobs_running": running,
    }
