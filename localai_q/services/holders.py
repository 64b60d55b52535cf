"""Who gives a file to the node that asks for it."""

from __future__ import annotations

import logging
import time
from typing import Any

from localai_q import names
from localai_q.cluster import tickets
from localai_q.cluster.holders import holders_of, is_to_check
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import NotFound
from localai_q.services import uploads
from localai_q.services.jobs import submit_node_job
from localai_q.services.wiring import Services
from localai_q.store import jobs, models, nodes, quantizations, replicas, wheels
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

CHECK = "check_file"
LOOKED_AT = 20  # checks of a node, to find the last of a file


def find(services: Services, asker: Node, sha256: str, *, called: str) -> dict[str, Any]:
    """From where a node can get a file that it needs. `called` is the host by which it reaches the API.

    Returns `{"holders": [{"node", "name", "url", "ticket"}], "stored": whether the API has the file itself}`, the
    nearest holder first; a ticket holds for `localai_q.cluster.tickets.LIFE` seconds.

    Raises:
        InvalidValue: that is no SHA-256.
        NotFound: nothing on this node needs that file.
    """
    stored = uploads.path_of(services, sha256).exists()
    with services.db.transaction() as db:
        _need(db, asker, sha256)
        known = nodes.every(db)
    now = time.time()
    holders = [
        {"node": node.id, "name": node.name, "url": f"http://{address}/blobs/{sha256}",
         "ticket": tickets.issue(node.secret_hash, node.id, sha256, now=now)}
        for node, address in holders_of(sha256, known, asker, called)
    ]  # fmt: skip
    return {"holders": holders, "stored": stored}


def blame(services: Services, asker: Node, sha256: str, holder_id: str) -> None:
    """A node got something else from a holder than the file.

    Raises:
        NotFound: nothing on this node needs that file, or there is no such holder.
    """
    with services.db.transaction() as db:
        _need(db, asker, sha256)
        holder = nodes.by_id(db, holder_id)
    if holder is None:
        raise NotFound(f"There is no node '{holder_id}'.")
    log.warning("node %s got wrong bytes of %s from node %s, which is to check its file: its disk may be failing",
                asker.name, sha256, holder.name, extra={"action": "holder"})  # fmt: skip
    _have_checked(services, holder, sha256)


def _have_checked(services: Services, holder: Node, sha256: str) -> None:
    """Have a node read its file, and remove it if it is wrong; unless it was found sound a moment ago."""
    with services.db.transaction() as db:
        line, now = names.node_jobs_queue(holder.id), clock(db)
        last = jobs.newest(db, kind=CHECK, line=line, limit=LOOKED_AT)
    if is_to_check(sha256, last, now=now):
        request = {"kind": CHECK, "sha256": sha256, "name": sha256}
        submit_node_job(services, kind=CHECK, node_id=holder.id, model_id=None, request=request)


def _need(db: Any, asker: Node, sha256: str) -> None:
    if sha256 in wheels.contents(db):
        return
    placed = {replica.model_id for replica in replicas.every(db, node_id=asker.id)}
    placed |= {str(job.model_id) for job in jobs.open_in(db, names.node_jobs_queue(asker.id))}
    if any(model.id in placed and sha256 in model.config.contents for model in models.every(db)):
        return
    if any(one.node_id == asker.id and sha256 in one.files for one in quantizations.every(db, states=[JobState.OPEN])):
        return
    raise NotFound(f"Node '{asker.name}' has nothing to do with the file '{sha256}'.")
