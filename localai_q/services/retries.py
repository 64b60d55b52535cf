"""What a node has failed to do, or was kept from doing, is done again because somebody asks for that."""

from __future__ import annotations

from localai_q.cluster.backends import REACHABLE
from localai_q.cluster.jobs import LOAD, NODE_JOBS
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled, Conflict, to_record
from localai_q.services import jobs, replicas
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import models, nodes
from localai_q.store import replicas as replica_rows
from localai_q.store.keys import ApiKey


def retry(services: Services, job_id: str, asker: ApiKey) -> str:
    """Have a node do again what has failed or was cancelled, or go on with what was paused; the id of the new job.

    Raises:
        NotFound: there is none of that id that `asker` may see.
        Conflict: it has not failed, is no job of a node, or its node is not there, or its model.
    """
    job = jobs.existing(services, job_id, asker)
    with services.db.transaction() as db:
        request = job_rows.kept_request(db, job.id)
        node = nodes.by_id(db, job.node_id or "")
        is_orphan = bool(job.model_id) and models.by_id(db, str(job.model_id)) is None
    if job.kind not in NODE_JOBS or request is None:
        raise Conflict(f"Job '{job_id}' is none of a node: send its request again.")
    if "quantization" in request:
        raise Conflict(
            f"Job '{job_id}' is a step of a quantization: localai-q quantize retry {request['quantization']} tries that again."
        )
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise Conflict(f"Job '{job_id}' is {job.state}: only what has failed or was cancelled can be tried again.")
    if is_orphan:
        raise Conflict(f"Job '{job_id}' cannot be tried again: its model was removed.")
    if node is None or node.state not in REACHABLE:
        raise Conflict(f"Job '{job_id}' cannot be tried again: its node is not there.")
    if job.kind == LOAD:
        return replicas.load_again(services, str(request["replica"]))
    again = jobs.submit_node_job(services, kind=job.kind, node_id=node.id, model_id=job.model_id, request=request)
    if job.is_paused:
        with services.db.transaction() as db:
            replica_rows.follow(db, job.id, again)
            job_rows.end_pause(db, job.id, to_record(Cancelled()))
    return again
