"""What an open stream holds while nothing comes: memory and descriptors of the web processes and of Valkey.

The streams wait in line behind one that does not end: of one model with one slot.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import psutil

from bench.cluster import Cluster
from bench.cost import cpu
from bench.sockets import Helper, request_for

SETTINGS = {"LOCALAI_Q_WEB_WORKERS": "3", "LOCALAI_Q_MAX_WAITING": "20000", "LOCALAI_REQUEST_TIMEOUT": "3600"}
SETTLE = 8.0  # seconds of rest, in which the cost of doing nothing is taken
UNITS = {"rss_mb": "MB RSS", "pss_mb": "MB PSS", "descriptors": "descriptors"}
ENDLESS = "[[echo tokens=100000 delay_ms=60000]]"


def raise_limit() -> int:
    """Let this process, and what it starts, open as many files as the system allows it: how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def measure(cluster: Cluster, levels: list[int]) -> list[dict[str, Any]]:
    """A look at each number of open streams, none at first."""
    cluster.add_model("idle", backend="echo", slots=1)
    found = [_look(cluster, 0, 0.0)]
    with Helper(cluster.host, cluster.port) as client:
        for streams in levels:
            took = client.hold(request_for(cluster, "idle", ENDLESS), streams)
            found.append(_look(cluster, streams, took))
    return found


def _look(cluster: Cluster, streams: int, took: float) -> dict[str, Any]:
    time.sleep(2.0)
    processes = cluster.processes()
    web, valkey = processes["web"], processes["valkey"]
    before = cpu(web), cpu(valkey)
    time.sleep(SETTLE)
    spent = cpu(web) - before[0], cpu(valkey) - before[1]
    return {
        "streams": streams,
        "opened_in_s": took,
        "web": _held(web) | {"cpu_percent": 100 * spent[0] / SETTLE},
        "valkey": _held(valkey) | {"cpu_percent": 100 * spent[1] / SETTLE},
        "valkey_used_mb": int(cluster.redis().info("memory")["used_memory"]) / 1e6,
        "descriptors_of_each_web": sorted(process.num_fds() for process in web),
    }


def _held(processes: list[psutil.Process]) -> dict[str, float]:
    """MB and descriptors of these processes together."""
    memory = [process.memory_full_info() for process in processes]
    return {
        "rss_mb": sum(each.rss for each in memory) / 1e6,
        "pss_mb": sum(getattr(each, "pss", 0) for each in memory) / 1e6,
        "descriptors": sum(process.num_fds() for process in processes),
    }


def show(looks: list[dict[str, Any]]) -> None:
    """Print each look, and what a thousand streams add."""
    print(f"idle streams, which wait in line ({', '.join(f'{name}={value}' for name, value in SETTINGS.items())}):")
    for look in looks:
        web, valkey = look["web"], look["valkey"]
        print(f"    {look['streams']:5d} open: web {web['rss_mb']:.0f} MB RSS, {web['pss_mb']:.0f} MB PSS, "
              f"{web['descriptors']:.0f} descriptors, {web['cpu_percent']:.0f} % of a core; valkey "
              f"{valkey['rss_mb']:.0f} MB RSS ({look['valkey_used_mb']:.1f} used), {valkey['descriptors']:.0f} "
              f"descriptors, {valkey['cpu_percent']:.0f} % of a core; opened in {look['opened_in_s']:.0f} s")  # fmt: skip
    first, last = looks[0], looks[-1]
    shown = [
        ("web", "rss_mb"),
        ("web", "pss_mb"),
        ("web", "descriptors"),
        ("valkey", "rss_mb"),
        ("valkey", "descriptors"),
    ]
    for role, what in shown:
        more = 1000 * (last[role][what] - first[role][what]) / last["streams"]
        print(f"    a thousand streams add to {role}: {more:.1f} {UNITS[what]}")
