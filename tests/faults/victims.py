"""The processes of a cluster by what they are, and what can be done to them."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
from e2e_cluster import Cluster, processes_of, until
from waiting import LIMIT

REPLICA = re.compile(r"-n (\S+)\.\d+@(\S+)")
JOBS = re.compile(r"-n jobs@(\S+)")


@dataclass(frozen=True)
class Web:
    """One more web process of a cluster."""

    address: str
    process: subprocess.Popen[bytes]


def role(line: list[str], name: str) -> str | None:
    """What a process is, by its command line; None for one that comes and goes."""
    text = " ".join(line)
    if text.startswith("postgres: ") or not line:
        return None
    if found := REPLICA.search(text):
        return f"replica {found[1]}@{found[2]}"
    if found := JOBS.search(text):
        return f"jobs @{found[1]}"
    known = {"valkey-server": "valkey", "bin/postgres": "postgres", "gunicorn": "web", "-Q control": "control",
             "celery -A localai_q flower": "flower", "server.py": "backend", "workers.node.holder": "holder", "localai-q up": "up"}  # fmt: skip
    for words, what in known.items():
        if words in text:
            return what
    return f"node @{name}" if "celery -A localai_q worker" in text else f"unknown: {text}"


def by_role(cluster: Cluster) -> dict[str, list[psutil.Process]]:
    """The cluster's processes, the oldest first."""
    found: dict[str, list[psutil.Process]] = {}
    for process, line in processes_of(cluster.home).items():
        with suppress(psutil.Error):
            what = role(line, process.environ().get("LOCALAI_NODE_NAME", ""))
            if what:
                found.setdefault(what, []).append(process)
    for processes in found.values():
        processes.sort(key=lambda process: process.pid)
    return found


def pids(cluster: Cluster, what: str) -> list[int]:
    """The ids of the processes whose role begins so. Of Postgres all count, for each serves a client of its own."""
    if what == "postgres":
        [server] = by_role(cluster)["postgres"]
        return [server.pid, *(child.pid for child in server.children())]
    found = running(cluster, what)
    assert found, f"there is no {what}"
    return found


def running(cluster: Cluster, what: str) -> list[int]:
    """The same, where there may be none at the moment."""
    return [process.pid for name, each in by_role(cluster).items() if f"{name} ".startswith(what) for process in each]


def send(which: list[int], what: signal.Signals) -> None:
    for pid in which:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


@contextmanager
def stopped(which: list[int]) -> Iterator[None]:
    """These processes stand still."""
    send(which, signal.SIGSTOP)
    try:
        yield
    finally:
        send(which, signal.SIGCONT)


@contextmanager
def away(cluster: Cluster, what: str) -> Iterator[None]:
    """A server is killed, and `up` is kept from starting it again."""
    with stopped(pids(cluster, "up")):
        send(pids(cluster, what)[:1], signal.SIGKILL)
        yield


def strike(cluster: Cluster, which: list[int], what: signal.Signals, pause: float) -> None:
    """Send a signal; what is stopped goes on after so many seconds."""
    if what is signal.SIGSTOP:
        with stopped(which):
            time.sleep(pause)
    else:
        send(which, what)


def node_name(cluster: Cluster, job_id: str) -> str:
    """The node that works on the job."""
    live = cluster.redis().hget(f"job:{job_id}", "node")
    assert live, f"nobody has job {job_id}"
    rows = cluster.sql("SELECT name FROM nodes WHERE id = %s", live.decode())
    return str(rows[0][0])


def owner(cluster: Cluster, job_id: str, model: str = "echo") -> int:
    """The replica's process that works on the job."""
    [pid] = pids(cluster, f"replica {model}@{node_name(cluster, job_id)} ")
    return pid


def backend_of(replica: int) -> int:
    """The engine's process of a replica."""

    def found() -> list[int]:
        children = psutil.Process(replica).children()
        return [child.pid for child in children if "server.py" in " ".join(child.cmdline())]

    return until(found, LIMIT, "the backend")[0]


def node_of(replica: int) -> int:
    """The node's process that started a replica."""
    return psutil.Process(replica).ppid()
