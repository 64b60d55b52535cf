"""Waiting for a cluster to become useful, over its HTTP API, with something to look at meanwhile.

It owns the polling, the approval of this machine's own nodes and the progress display. Starting processes and printing
the facts at the end are left to `localai_q.cli.machine`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import httpx
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from localai_q.cluster.joblog import shown
from localai_q.supervisor import say

POLL = 0.3  # seconds between two looks
PATIENCE = 20.0  # seconds without progress after which it is said what is waited for
NO_WORK = 30.0  # seconds after which a model that nobody loads is not waited for any longer

APPROVED = {"ready", "draining", "drained"}
WORK = {
    "install_backend": "installing a backend",
    "upgrade_backend": "upgrading a backend",
    "delete_backend": "deleting a backend",
    "fetch_model": "fetching",
    "load_model": "loading",
    "quantize": "quantizing",
}

Record = dict[str, Any]
T = TypeVar("T")


class Stopped(Exception):
    """The person wants everything to stop: give up waiting."""


class Client:
    """The few calls of the cluster's API that `up` makes.

    Args:
        key_file: where the web process writes the admin key at its first start; read anew until it is accepted.
    """

    def __init__(self, base_url: str, key_file: Path) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=10.0, trust_env=False)
        self._key_file = key_file
        self._refused: str | None = None
        self.problem = "it has not answered yet"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def key(self) -> str:
        """The admin key; empty until there is one."""
        try:
            return self._key_file.read_text().strip()
        except OSError:
            return ""

    def nodes(self) -> list[Record] | None:
        """All nodes; None while the API does not answer."""
        return self._list("/api/nodes", "nodes")

    def models(self) -> list[Record] | None:
        """All models with their replicas; None while the API does not answer."""
        return self._list("/api/models", "models")

    def open_jobs(self) -> list[Record] | None:
        """The jobs that are not finished; None while the API does not answer."""
        return self._list("/api/jobs?state=open", "jobs")

    def approve(self, node_id: str) -> None:
        """Let a node in; a failure shows in the next look at the nodes."""
        self._call("POST", f"/api/nodes/{node_id}/approve")

    def _list(self, path: str, name: str) -> list[Record] | None:
        answer = self._call("GET", path)
        if answer is None:
            return None
        try:
            records: list[Record] = answer.json()[name]
        except (ValueError, KeyError, TypeError):
            self.problem = f"GET {path} gave no list of {name}"
            return None
        return records

    def _call(self, method: str, path: str) -> httpx.Response | None:
        """The answer if it is a good one; else None, with the reason in `problem`."""
        key = self.key()
        try:
            answer = self._http.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        except httpx.HTTPError as error:
            self.problem = f"it does not answer: {error}"
            return None
        if answer.status_code in (401, 403):
            self._refuse(key)
            return None
        if not answer.is_success:
            self.problem = f"{method} {path} gave status {answer.status_code}"
            return None
        return answer

    def _refuse(self, key: str) -> None:
        """Note that this key is not accepted; said once, for only a person can end that."""
        self.problem = ""
        if key != self._refused:
            self._refused = key
            say(
                f"the API does not accept the key in {self._key_file}: run 'localai-q keys reset-admin', then this goes on"
            )


def until(probe: Callable[[], tuple[T | None, str]], log: Path, stopping: threading.Event) -> T:
    """Call `probe` until it has a result, and say what is waited for when nothing changes.

    Args:
        probe: returns the result, or None, and what it waits for; a change of that text is progress, and none is not said.
        log: the log to name.

    Raises:
        Stopped: `stopping` was set.
    """
    waiting_for, since = "", time.monotonic()
    while not stopping.is_set():
        result, text = probe()
        if result is not None:
            return result
        if text != waiting_for:
            waiting_for, since = text, time.monotonic()
        elif text and time.monotonic() - since > PATIENCE:
            say(f"still waiting for {text} (log: {log})")
            since = time.monotonic()
        stopping.wait(POLL)
    raise Stopped


def wait_for_web(client: Client, log: Path, stopping: threading.Event) -> None:
    """Return when the API answers to the admin key."""

    def probe() -> tuple[bool | None, str]:
        if client.nodes() is not None:
            return True, ""
        return None, client.problem and f"the web process: {client.problem}"

    until(probe, log, stopping)


def wait_for_nodes(client: Client, names: Collection[str], log: Path, stopping: threading.Event) -> list[str]:
    """Approve the nodes of these names as they register; returns their ids, in the order of `names`, once all are in."""

    def probe() -> tuple[list[str] | None, str]:
        nodes = {node["name"]: node for node in client.nodes() or [] if node["name"] in names}
        for node in nodes.values():
            if node["state"] == "pending":
                client.approve(node["id"])
        missing = {name: nodes[name]["state"] if name in nodes else "not registered" for name in names}
        missing = {name: state for name, state in missing.items() if state not in APPROVED}
        if not missing:
            return [str(nodes[name]["id"]) for name in names], ""
        return None, "node " + ", ".join(f"{name} ({state})" for name, state in missing.items())

    return until(probe, log, stopping)


def wait_for_model(client: Client, log: Path, stopping: threading.Event) -> str:
    """Return the default model's name when it can be used, or when waiting longer has no use, which is said.

    Returns:
        The name; empty where there is no default model.
    """
    idle_since = time.monotonic()

    with display() as shown:

        def probe() -> tuple[str | None, str]:
            nonlocal idle_since
            jobs = [job for job in client.open_jobs() or [] if job["kind"] in WORK]
            shown.show(jobs)
            model = next((m for m in client.models() or [] if m.get("default")), None)
            replicas = model["replicas"] if model else []
            if jobs or replicas:
                idle_since = time.monotonic()
            verdict = _verdict(model, replicas, jobs, time.monotonic() - idle_since)
            return verdict, _stage(model, replicas, jobs, client.problem)

        return until(probe, log, stopping)


def _verdict(model: Record | None, replicas: list[Record], jobs: list[Record], idle: float) -> str | None:
    """The model's name if there is nothing more to wait for."""
    states = {replica["state"] for replica in replicas}
    if model and "ready" in states:
        return str(model["name"])
    if model and states == {"failed"} and not jobs:
        say(shown(f"{model['name']} could not be loaded: {replicas[-1].get('reason') or 'no reason was given'}"))
        say("the cluster is up without it: see 'localai-q models --help', or the log of the node, for what to do")
        return str(model["name"])
    if idle > NO_WORK:
        say(f"{model['name']} is not loaded: no node is ready for it or has room; its first request says why"
            if model else "there is no default model")  # fmt: skip
        return str(model["name"]) if model else ""
    return None


def _stage(model: Record | None, replicas: list[Record], jobs: list[Record], problem: str) -> str:
    if model is None:
        return f"the default model to be made known ({problem})"
    steps = [f"{job['kind']} {job.get('progress')}" for job in jobs] + [replica["state"] for replica in replicas]
    return f"the model {model['name']} ({', '.join(steps) or 'no replica yet'})"


class Display(Protocol):
    """Shows the jobs that a start waits for."""

    def show(self, jobs: list[Record]) -> None:
        """Show these jobs, and no longer those that were shown before."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display() -> Display:
    """Bars on a terminal, else a line whenever a stage changes."""
    return Bars() if sys.stdout.isatty() else Lines()


def _title(job: Record) -> str:
    what = f"{WORK.get(job['kind'], job['kind'])} {job.get('subject') or job.get('model') or ''}".strip()
    return shown(f"{what} on {job['node']}" if job.get("node") else what)


def _stage_of(job: Record) -> str:
    return shown(str((job.get("progress") or {}).get("stage") or "waiting"))


class Lines:
    """A plain line for each new stage of each job."""

    def __init__(self) -> None:
        self._stages: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, jobs: list[Record]) -> None:
        """Print the stages that are new."""
        for job in jobs:
            stage = _stage_of(job)
            if self._stages.get(job["id"]) != stage:
                self._stages[job["id"]] = stage
                say(f"{_title(job)}: {stage}")


class Bars:
    """One bar for each job."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._progress = Progress(*columns, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, jobs: list[Record]) -> None:
        """Draw these jobs."""
        for job in jobs:
            self._draw(job)
        for job_id in self._tasks.keys() - {job["id"] for job in jobs}:
            self._progress.remove_task(self._tasks.pop(job_id))

    def _draw(self, job: Record) -> None:
        progress = job.get("progress") or {}
        if job["id"] not in self._tasks:
            self._tasks[job["id"]] = self._progress.add_task(_title(job), total=None, note="")
        self._progress.update(
            self._tasks[job["id"]],
            description=f"{_title(job)}: {_stage_of(job)}",
            total=progress.get("total") or None,
            completed=progress.get("done") or 0,
            note=amount(progress),
        )


def amount(progress: Record) -> str:
    """How far a job is, in words: its note, else done and total with their unit."""
    if progress.get("note"):
        return shown(str(progress["note"]))
    done, total, unit = progress.get("done"), progress.get("total"), progress.get("unit") or ""
    if done is None:
        return ""
    if unit in ("bytes", "B"):
        return decimal(int(done)) + (f" of {decimal(int(total))}" if total else "")
    return f"{done} of {total} {unit}".strip() if total else f"{done} {unit}".strip()
