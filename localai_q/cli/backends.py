"""`localai-q backends`: the engines of the cluster, on one node or on all."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from localai_q.cli.client import Api, connect
from localai_q.cli.jobs import POLL, follow
from localai_q.cli.show import AsJson, rows, when
from localai_q.cli.watch import display
from localai_q.errors import InvalidValue, LocalAIError

app = typer.Typer(no_args_is_help=True, help="List backends, install, upgrade and delete them on nodes.")

Name = Annotated[str, typer.Argument(help="The backend's name, or GALLERY@NAME; 'list --available' shows them.")]
Node = Annotated[str, typer.Option("--node", help="On this node, now.")]
All = Annotated[bool, typer.Option("--all", help="On every node; those that are away follow when they are back.")]
Selector = Annotated[list[str] | None, typer.Option(help="With --all, key=value: a label of the nodes; repeatable.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the id and return at once.")]


@app.command("list")
def list_backends(
    available: Annotated[bool, typer.Option("--available", help="What can be installed instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which node has which version of which backend; DRIFT where nodes of a kind differ."""
    records: Any = connect().call("GET", "/backends/available" if available else "/api/backends")
    if as_json:
        rows(records, [], as_json=True, empty="")
    elif available:
        shown = [
            {
                **one,
                "gallery": one["gallery"]["name"],
                "builds": ", ".join(one["builds"]),
                "nodes": ", ".join(one["nodes"]),
            }
            for one in records
        ]
        rows(
            shown, ["name", "gallery", "version", "builds", "nodes", "description"], as_json=False, empty="No backends."
        )
    else:
        rows([row for one in records for row in _on_nodes(one)],
             ["name", "node", "version", "build", "digest", "drift", "installed"], as_json=False,
             empty="No node has a backend yet: a model that is loaded brings its own.")  # fmt: skip


@app.command("install")
def install(
    name: Name, node: Node = "", everywhere: All = False, selector: Selector = None, no_wait: NoWait = False,
    uri: Annotated[str, typer.Option(help="Of an archive that becomes a new backend of this name.")] = "",
    sha256: Annotated[str, typer.Option(help="The SHA-256 of that archive, unless a registry tells it.")] = "",
    alias: Annotated[str, typer.Option(help="With --uri: another name by which models can name it.")] = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Install a backend where it is not.

    Ends with 0 when it is done, and with 1 when it failed, was cancelled, or waits for a node that is away.

    Examples:

        localai-q backends install xllamacpp --node attic

        localai-q backends install xllamacpp --all --selector zone=home

        localai-q backends install mine --all --uri oci://ghcr.io/me/mine:1.2
    """
    given = {"uri": uri, "name": name, "sha256": sha256, "alias": alias} if uri else {}
    if (sha256 or alias) and not uri:
        raise InvalidValue("--sha256 and --alias go with --uri")
    _change("install", name, node, everywhere, selector or [], no_wait=no_wait, as_json=as_json, given=given)


@app.command("upgrade")
def upgrade(
    name: Name, node: Node = "", everywhere: All = False, selector: Selector = None, no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a backend anew where it is, of the newest there is. What runs keeps its version until it ends."""
    _change("upgrade", name, node, everywhere, selector or [], no_wait=no_wait, as_json=as_json)


@app.command("upgrades")
def list_upgrades(
    check: Annotated[bool, typer.Option("--check", help="Read the galleries anew first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which node has another version of a backend than the one that is to be had: 'upgrade NAME --all' makes it."""
    api = connect()
    found = api.call("POST", "/backends/upgrades/check") if check else api.call("GET", "/backends/upgrades")
    if as_json:
        print(json.dumps(found, indent=2))
        return
    shown = [
        {"name": name, "node": node["node_name"], "installed": node["version"], "available": told["available_version"],
         "upgradable": node["upgradable"]}
        for name, told in found.items()
        for node in told["node_drift"]
    ]  # fmt: skip
    rows(shown, ["name", "node", "installed", "available", "upgradable"], as_json=False, empty="Nothing to upgrade.")


@app.command("delete")
def delete(
    name: Name, node: Node = "", everywhere: All = False, selector: Selector = None, no_wait: NoWait = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Remove a backend where it is. A model that is loaded there later brings it back."""
    _change("delete", name, node, everywhere, selector or [], no_wait=no_wait, as_json=as_json)


@app.command("wheels")
def wheels(
    delete: Annotated[str, typer.Option("--delete", help="Forget this one: its id, or the beginning of it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show what nodes with the label 'builder' have compiled for others."""
    api = connect()
    found: list[dict[str, Any]] = api.call("GET", "/api/wheels")["wheels"]
    if delete:
        found = [one for one in found if one["id"].startswith(delete)]
        if len(found) != 1:
            raise InvalidValue(f"{len(found)} wheels have an id that begins with '{delete}'")
        api.call("DELETE", "/api/wheels/{}", found[0]["id"])
    shown = [
        {**one, "id": one["id"][:12], "size": f"{one['size'] / 2**20:.1f} MiB", "made": when(one["created"])}
        for one in found
    ]
    rows(found if as_json else shown, ["id", "package", "version", "build", "python", "libc", "cpu", "size", "node", "made"],
         as_json=as_json, empty="None: 'localai-q nodes label NODE builder=true' has a node give what it compiles.")  # fmt: skip


def _change(
    op: str, name: str, node: str, everywhere: bool, selector: list[str], *, no_wait: bool, as_json: bool,
    given: dict[str, str] | None = None,
) -> None:  # fmt: skip
    if bool(node) == everywhere:
        raise InvalidValue(f"say where to {op} {name}: --node NAME or --all")
    if selector and not everywhere:
        raise InvalidValue("--selector narrows --all")
    api = connect()
    if node:
        body = given or {"backend": name}
        job_id = str(api.call("POST", f"/api/nodes/{{}}/backends/{op}", node, json=body)["jobID"])
        if no_wait:
            print(job_id)
        else:
            follow(api, job_id, as_json=as_json)
        return
    labels = dict(pair.split("=", 1) for pair in selector if "=" in pair)
    if len(labels) != len(selector):
        raise InvalidValue(f"--selector needs key=value, each key once: {' '.join(selector)}")
    if op == "install":
        made = api.call("POST", "/backends/apply", json={**(given or {"id": name}), "selector": labels})
    else:
        made = api.call("POST", f"/backends/{op}/{{}}", name, json={"selector": labels})
    if no_wait:
        print(made["uuid"])
    else:
        _follow_all(api, made, as_json=as_json)


def _follow_all(api: Api, made: dict[str, Any], *, as_json: bool) -> None:
    """Show a request for many nodes until nothing of it moves any more."""
    with display() as shown:
        while not made["processed"] and not _only_waits(made):
            if not as_json:
                shown.show([api.follow("/api/jobs/{}", one["job"]) for one in made["nodes"] if one["job"]])
            time.sleep(POLL)
            made = api.follow("/backends/jobs/{}", made["uuid"])
    rows([made] if as_json else made["nodes"], ["node_name", "status", "attempts", "error"], as_json=as_json, empty="")
    left = [one["node_name"] for one in made["nodes"] if one["status"] != "done"]
    if left:
        raise LocalAIError(f"not done on {', '.join(left)}: GET /backends/jobs/{made['uuid']} shows what becomes of it")


def _only_waits(made: dict[str, Any]) -> bool:
    """Whether what is not done yet is for nodes that are away, or is tried again later."""
    return all(one["status"] != "open" or one["next_try"] or one["away"] for one in made["nodes"])


def _on_nodes(backend: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": backend["name"], "node": node["node_name"], "version": node["version"], "build": node["build"],
         "digest": node["digest"][:12], "drift": backend["drift"], "installed": when(node["installed_at"])}
        for node in backend["nodes"]
    ]  # fmt: skip
