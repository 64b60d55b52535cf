"""Who gives a file to the node that asks for it."""

from __future__ import annotations

import logging
import time
from typing import Any

from localai_q.cluster import tickets
from localai_q.cluster.holders import holders_of
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import NotFound
from localai_q.services import uploads
from localai_q.services.wiring import Services
from localai_q.store import models, nodes, quantizations, replicas, wheels

log = logging.getLogger(__name__)


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
    log.warning("node %s got wrong bytes of %s from node %s: its disk may be failing; remove the file there",
                asker.name, sha256, holder.name, extra={"action": "holder"})  # fmt: skip


def _need(db: Any, asker: Node, sha256: str) -> None:
    if sha256 in wheels.contents(db):
        return
    placed = {replica.model_id for replica in replicas.every(db, node_id=asker.id)}
    if any(model.id in placed and sha256 in model.config.contents for model in models.every(db)):
        return
    if any(one.node_id == asker.id and sha256 in one.files for one in quantizations.every(db, states=[JobState.OPEN])):
        return
    raise NotFound(f"Node '{asker.name}' has nothing to do with the file '{sha256}'.")
