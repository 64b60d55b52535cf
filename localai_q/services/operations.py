"""What nodes are doing, in LocalAI's form: installs, fetches, loads, deletions; and what they have done."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from localai_q.cluster.backends import WishState
from localai_q.cluster.jobs import BACKEND_JOBS, DOWNLOADS, LOAD, NODE_JOBS, is_pause
from localai_q.cluster.states import JobState
from localai_q.errors import NotFound
from localai_q.services import backends, jobs, quantizations
from localai_q.services.wiring import Services
from localai_q.store.keys import ApiKey

Record = dict[str, Any]

TASKS = {"install_backend": "installation", "upgrade_backend": "upgrade", "delete_backend": "deletion",
         "fetch_model": "staging", LOAD: "load", "clean_models": "deletion", "check_file": "check", "scan_files": "scan",
         "import_files": "installation", "quantize": "quantization"}  # fmt: skip
OUTCOMES = {"done": "completed", "failed": "failed", "cancelled": "cancelled"}
MOST_OPEN = 1000


def current(services: Services) -> list[Record]:
    """What is open, the least advanced first; with what many nodes were asked for and some cannot do yet, or at all."""
    found = jobs.listed(services, states=(JobState.OPEN,), kinds=NODE_JOBS, limit=MOST_OPEN)
    operations = [*map(_of_job, found), *_paused(services), *_waiting(services), *_unplaced(services)]
    return sorted(operations, key=lambda one: (one["progress"], one["id"], one["jobID"]))


def history(services: Services, *, limit: int) -> list[Record]:
    """What has ended, the newest first."""
    ended = [state for state in JobState if state is not JobState.OPEN]
    found = jobs.listed(services, states=ended, kinds=NODE_JOBS, limit=limit)
    return [
        {**_named(job["subject"] or job["kind"]), **_task(job["kind"]), "jobID": job["id"], "outcome": OUTCOMES[job["state"]],
         "error": (job["error"] or {}).get("message"), "nodeID": job["node_id"], "nodeName": job["node"],
         "started": job["created"], "ended": job["ended"]}
        for job in found
        if not is_pause(job["error"])
    ]  # fmt: skip


def cancel(services: Services, operation_id: str, asker: ApiKey) -> None:
    """Cancel a job of a node, stop a quantization, or take back what of a request for many nodes is not done.

    Raises:
        NotFound: there is none of that id.
    """
    for end in (lambda: jobs.cancel(services, operation_id, asker), lambda: quantizations.stop(services, operation_id)):
        with suppress(NotFound):
            end()
            return
    backends.give_up(services, operation_id)


def dismiss(services: Services, operation_id: str, asker: ApiKey) -> None:
    """Forget a job that has ended, or what has ended of a request for many nodes.

    Raises:
        NotFound: there is none of that id.
        Conflict: nothing of it has ended.
    """
    try:
        jobs.forget(services, operation_id, asker)
    except NotFound:
        backends.dismiss(services, operation_id)


def forget_history(services: Services) -> int:
    """Forget every job of a node that has ended; how many."""
    return jobs.prune(services, older_than=0.0, states=(), kinds=NODE_JOBS)


def _of_job(job: Record) -> Record:
    progress = job["progress"] or {}
    done, total = progress.get("done", 0), progress.get("total", 0)
    sizes = {"currentBytes": int(done), "totalBytes": int(total)} if progress.get("unit") in ("bytes", "B") else {}
    return {
        **_named(job["subject"] or job["kind"]),
        **_task(job["kind"]),
        "jobID": job["id"],
        "progress": int(min(100.0 * done / total, 100.0)) if total else 0,
        "isQueued": job["live"] != "leased",
        "cancellable": True,
        "message": progress.get("note") or "",
        "phase": progress.get("stage") or "queued",
        "nodeID": job["node_id"],
        "nodeName": job["node"],
        **sizes,
    }


def _paused(services: Services) -> list[Record]:
    """Downloads that were paused, and neither gone on with nor given up since."""
    found = jobs.listed(services, states=(JobState.CANCELLED,), kinds=DOWNLOADS, limit=MOST_OPEN)
    return [{**_of_job(job), "isQueued": False, "phase": "paused"} for job in found if is_pause(job["error"])]


def _waiting(services: Services) -> list[Record]:
    """What is wanted of nodes that have no job for it now: they are away, it has failed, or it was given up."""
    shown = []
    for operation in backends.operations(services):
        for node in operation["nodes"]:
            if node["job"] or node["status"] not in (WishState.OPEN, WishState.DEAD):
                continue
            dead = node["status"] == WishState.DEAD
            message = (
                f"given up after {node['attempts']} attempts" if dead else "waiting for the node, or for its next try"
            )
            shown.append({**_named(operation["gallery_element_name"]), **_task(f"{operation['op']}_backend"),
                          "jobID": operation["uuid"], "progress": 0, "isQueued": not dead, "cancellable": not dead,
                          "message": message, "phase": "dead" if dead else "waiting", "error": node["error"],
                          "nodeID": node["node_id"], "nodeName": node["node_name"]})  # fmt: skip
    return shown


def _unplaced(services: Services) -> list[Record]:
    """Quantizations that no node works on."""
    return [
        {**_named(one["name"]), **_task("quantize"), "jobID": one["id"], "progress": 0, "isQueued": True,
         "cancellable": True, "message": one["message"], "phase": "waiting", "nodeID": None, "nodeName": None}
        for one in quantizations.listed(services) if one["state"] is JobState.OPEN and not one["job"]
    ]  # fmt: skip


def _named(subject: str | None) -> Record:
    return {"id": subject or "", "name": subject or "", "fullName": subject or ""}


def _task(kind: str) -> Record:
    task = TASKS.get(kind, kind)
    return {"taskType": task, "isDeletion": task == "deletion", "isBackend": kind in BACKEND_JOBS}
