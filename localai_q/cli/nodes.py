"""`localai-q nodes`: the machines of the cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.filesize import decimal

from localai_q.cli.client import connect
from localai_q.cli.jobs import need_done, wait
from localai_q.cli.show import AsJson, rows, text, when
from localai_q.errors import InvalidValue

app = typer.Typer(no_args_is_help=True, help="List nodes, let new ones in, empty them for maintenance, delete them.")

LIMITS = ("vram-budget", "max-replicas-per-model")

NodeArgument = Annotated[str, typer.Argument(help="The node's name or id.")]


@app.command("list")
def list_nodes(as_json: AsJson = False) -> None:
    """Show every node and what it runs."""
    found = connect().call("GET", "/api/nodes")["nodes"]
    shown = found if as_json else [_shown(node) for node in found]
    rows(shown, ["name", "state", "remains", "labels", "cpus", "ram_free", "gpus", "runs", "seen"], as_json=as_json,
         empty="No nodes yet: 'localai-q up' prints the line with which a machine joins.")  # fmt: skip


@app.command("approve")
def approve_node(node: NodeArgument) -> None:
    """Let a node in that waits for it."""
    made = connect().call("POST", "/api/nodes/{}/approve", node)
    print(f"Approved {made['name']}.")


@app.command("drain")
def drain_node(node: NodeArgument) -> None:
    """Empty a node: it finishes what it works on and gets nothing new.

    Others load what only it had. It stays so, even after a restart, until 'localai-q nodes resume'. It is 'drained'
    when nothing is left on it; until then 'localai-q nodes list' shows what remains.
    """
    made = connect().call("POST", "/api/nodes/{}/drain", node)
    print(f"{made['name']} is {made['state']}. To see what remains: localai-q nodes show {made['name']}")


@app.command("resume")
def resume_node(node: NodeArgument) -> None:
    """Let a node work again that was drained."""
    made = connect().call("POST", "/api/nodes/{}/resume", node)
    print(f"{made['name']} is {made['state']}.")


@app.command("rotate")
def rotate_secret(node: NodeArgument) -> None:
    """Have a node make itself a new secret, with its next report. What it works on goes on; the old one is withdrawn."""
    made = connect().call("POST", "/api/nodes/{}/rotate", node)
    print(f"{made['name']} makes itself a new secret.")


@app.command("delete")
def delete_node(
    node: NodeArgument,
    force: Annotated[bool, typer.Option("--force", help="Even if it is at work: what it does ends.")] = False,
) -> None:
    """Forget a node. Its process ends, and the name is free.

    A node at work is drained first: localai-q nodes drain NODE
    """
    made = connect().call("DELETE", "/api/nodes/{}", node, params={"force": str(force).lower()})
    print(f"Deleted {made['name']}.")


@app.command("label")
def label_node(
    node: NodeArgument,
    changes: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE gives a label, KEY- takes it back; none: show them.")
    ] = None,
) -> None:
    """Give a node labels, take them back, or show all it has.

    A node has some by what it is: node.name, node.os, node.arch, gpu.vendor, gpu.vram,
    gpu.compute-capability. One that you give goes before
    these, and stays when the node registers again.

    Examples:

        localai-q nodes label attic zone=home tier=slow

        localai-q nodes label attic tier-
    """
    api = connect()
    wanted = [change.partition("=") for change in changes or []]
    if unclear := [key for key, sign, _ in wanted if not sign and not key.endswith("-")]:
        raise InvalidValue(f"'{unclear[0]}' is no change of a label: write {unclear[0]}=VALUE, or {unclear[0]}-")
    if given := {key: value for key, sign, value in wanted if sign}:
        api.call("PATCH", "/api/nodes/{}/labels", node, json=given)
    for key in [key.removesuffix("-") for key, sign, _ in wanted if not sign]:
        api.call("DELETE", "/api/nodes/{}/labels/{}", node, key)
    found = api.call("GET", "/api/nodes/{}/labels", node)
    for key, value in sorted(found["labels"].items()):
        print(f"{key}={text(value)}" + ("" if key in found["given"] else "  (found by itself)"))


@app.command("limit")
def limit_node(
    node: NodeArgument,
    changes: Annotated[
        list[str] | None, typer.Argument(help="vram-budget=80%, max-replicas-per-model=2, or NAME- to take it back.")
    ] = None,
) -> None:
    """Limit what a node may hold, take that back, or show it.

    vram-budget is how much of its memory models may take, of the GPUs' where it has some: 80%, 12GiB or a number of
    bytes. max-replicas-per-model is how many copies of one model it may run. What you say goes before the node's own
    settings and stays when the node registers again.

    Examples:

        localai-q nodes limit attic vram-budget=80% max-replicas-per-model=2

        localai-q nodes limit attic vram-budget-
    """
    api = connect()
    for change in changes or []:
        name, sign, value = change.partition("=")
        if name.removesuffix("-") not in LIMITS or bool(sign) == name.endswith("-"):
            raise InvalidValue(f"'{change}' limits nothing: write {' or '.join(f'{each}=VALUE' for each in LIMITS)}")
        if sign:
            body = {"value": int(value) if name == "max-replicas-per-model" and value.isdecimal() else value}
            api.call("PUT", f"/api/nodes/{{}}/{name}", node, json=body)
        else:
            api.call("DELETE", f"/api/nodes/{{}}/{name.removesuffix('-')}", node)
    found = api.call("GET", "/api/nodes/{}", node)
    for name in LIMITS:
        print(f"{name}={_limit(found, name)}")


@app.command("clean")
def clean_node(
    node: NodeArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the files of models that no model of the cluster names. The cluster does so by itself, too.

    Files that came lately are kept for a time (LOCALAI_Q_CLEAN_GRACE), for a model may be about to be added.
    """
    api = connect()
    job_id = api.call("POST", "/api/nodes/{}/models/clean", node, params={"dry_run": str(dry_run).lower()})["job"]
    result = need_done(wait(api, job_id, quiet=True))["result"]
    shown = [{"sha256": blob["sha256"], "size": decimal(blob["size"])} for blob in result["removed"]]
    rows([result] if as_json else shown, ["sha256", "size"], as_json=as_json, empty="There is nothing to remove.")
    if shown and not as_json:
        print(f"{'This would free' if dry_run else 'Freed'} {decimal(result['freed'])}.")


@app.command("show")
def show_node(node: NodeArgument, as_json: AsJson = False) -> None:
    """Show one node: its machine, and every copy of a model on it with what that works on."""
    found = connect().call("GET", "/api/nodes/{}", node)
    if as_json:
        rows([found], [], as_json=True, empty="")
        return
    for title, value in _facts(found).items():
        print(f"{title:<10}{text(value)}")
    shown = [
        {**replica, "tokens/s": replica["tokens_per_second"] or None, "seen": when(replica["reported"])}
        for replica in found["replicas"]
    ]
    rows(shown, ["model", "number", "state", "in_flight", "slots", "tokens/s", "seen", "reason"], as_json=False,
         empty="It runs no model.")  # fmt: skip


def _shown(node: dict[str, Any]) -> dict[str, Any]:
    hardware = node["hardware"]
    return {
        **node,
        "cpus": hardware.get("cpus"),
        "ram_free": decimal(hardware["ram_available"]) if hardware.get("ram_available") else None,
        "gpus": ", ".join(gpu.get("name", "?") for gpu in hardware.get("gpus", [])),
        "runs": ", ".join(f"{replica['model']}: {replica['state']}" for replica in node["replicas"]),
        "remains": _remains(node["remains"]),
        "labels": _pairs(node["given_labels"]),
        "seen": when(node["last_heartbeat"]),
    }


def _facts(node: dict[str, Any]) -> dict[str, Any]:
    shown = _shown(node)
    facts = ("name", "id", "state", "remains", "version", "cpus", "ram_free", "gpus", "seen")
    more = {"labels": _pairs(node["labels"]), "budget": _limit(node, "vram-budget"),
            "slots": _limit(node, "max-replicas-per-model")}  # fmt: skip
    return {**{name.replace("_", " "): shown[name] for name in facts}, **more}


def _limit(node: dict[str, Any], limit: str) -> str:
    """A limit of the node, in words."""
    name = limit.replace("-", "_")
    value = node[name]
    if limit == "vram-budget":
        size = node["vram_budget_bytes"]
        value = " = ".join([part for part in (value, decimal(size) if size is not None else "") if part]) or "-"
    return f"{value}" + ("" if node[f"{name}_manually_set"] else "  (as the node says)")


def _remains(remains: dict[str, Any] | None) -> str | None:
    """What a draining node has still to finish."""
    if remains is None:
        return None
    jobs = "?" if remains["in_flight"] is None else remains["in_flight"]
    return f"{remains['replicas']} copies, {jobs} at work"


def _pairs(labels: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
