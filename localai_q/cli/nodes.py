"""`localai-q nodes`: the machines of the cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.filesize import decimal

from localai_q.cli.client import connect
from localai_q.cli.show import AsJson, rows, when

app = typer.Typer(no_args_is_help=True, help="List nodes, and let new ones in.")


@app.command("list")
def list_nodes(as_json: AsJson = False) -> None:
    """Show every node and what it runs."""
    found = connect().call("GET", "/api/nodes")["nodes"]
    shown = found if as_json else [_shown(node) for node in found]
    rows(shown, ["name", "state", "cpus", "ram_free", "gpus", "runs", "seen"], as_json=as_json,
         empty="No nodes yet: 'localai-q up' prints the line with which a machine joins.")  # fmt: skip


@app.command("approve")
def approve_node(node: Annotated[str, typer.Argument(help="The node's name or id.")]) -> None:
    """Let a node in that waits for it."""
    made = connect().call("POST", "/api/nodes/{}/approve", node)
    print(f"Approved {made['name']}.")


def _shown(node: dict[str, Any]) -> dict[str, Any]:
    hardware = node["hardware"]
    return {
        **node,
        "cpus": hardware.get("cpus"),
        "ram_free": decimal(hardware["ram_available"]) if hardware.get("ram_available") else None,
        "gpus": ", ".join(gpu["name"] for gpu in hardware.get("gpus", [])),
        "runs": ", ".join(f"{replica['model']}: {replica['state']}" for replica in node["replicas"]),
        "seen": when(node["last_heartbeat"]),
    }
