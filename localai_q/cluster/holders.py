"""Who is to give a file to a node that needs it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from ipaddress import ip_address

from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import NodeState

MOST_HOLDERS = 8
CHECKED = 3600.0  # seconds for which a file that was found sound is not read again for somebody's word
GIVING = (NodeState.READY, NodeState.DRAINING, NodeState.DRAINED)


def holders_of(sha256: str, known: Sequence[Node], asker: Node, called: str) -> list[tuple[Node, str]]:
    """The nodes that have the file, with the `HOST:PORT` at which the asker reaches each, the nearest first.

    Those of the asker's own machine go first, then those with the fewest transfers under way. Equals come in another
    order for each asker.

    Args:
        sha256: the file.
        known: all nodes.
        asker: who needs it.
        called: the host by which the asker reaches the API.
    """
    own = _host(str(asker.hardware.get("files_address") or ""))
    found: list[tuple[bool, int, bytes, Node, str]] = []
    for node in known:
        address = address_for(str(node.hardware.get("files_address") or ""), called)
        if node.id == asker.id or node.state not in GIVING or not address:
            continue
        if sha256 in (node.hardware.get("files") or ()):
            told = str(node.hardware.get("files_address"))
            turn = hashlib.sha256(f"{asker.id} {node.id}".encode()).digest()
            found.append((_host(told) != own, int(node.hardware.get("transfers") or 0), turn, node, address))
    found.sort(key=lambda each: each[:3])
    return [(node, address) for *_, node, address in found[:MOST_HOLDERS]]


def is_to_check(sha256: str, checks: Sequence[Job], *, now: float) -> bool:
    """Whether a node is to read a file again that it is said to have wrong, given its checks, the newest first."""
    last = next((job for job in checks if job.subject == sha256), None)
    sound = last is not None and (last.result or {}).get("found") == sha256
    return not sound or last is None or last.ended is None or now > last.ended + CHECKED


def address_for(told: str, called: str) -> str:
    """Where somebody who reaches the API by the host `called` reaches what a node says of itself; empty: nowhere.

    A node that is at every address of its machine and says so is on the API's machine. A loopback address is of use on
    that machine only.
    """
    host, _, port = told.rpartition(":")
    if not host:
        return ""
    if host.strip("[]") in ("0.0.0.0", "::"):  # noqa: S104
        return f"[{called}]:{port}" if ":" in called else f"{called}:{port}"
    return "" if is_loopback(host) and not is_loopback(called) else told


def is_loopback(host: str) -> bool:
    """Whether a host, in brackets or not, is the machine itself."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _host(address: str) -> str:
    return address.rpartition(":")[0]
