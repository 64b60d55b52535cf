"""`localai-q keys`: who may call the API."""

from __future__ import annotations

from typing import Annotated

import typer

from localai_q.cli.client import connect
from localai_q.cli.show import AsJson, rows, when

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys.")


@app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in lists.")],
    admin: Annotated[bool, typer.Option("--admin", help="It may manage the cluster, too.")] = False,
) -> None:
    """Make a key. It is printed this once."""
    made = connect().call("POST", "/api/keys", json={"name": name, "role": "admin" if admin else "user"})
    print(made["key"])


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Show the keys, without their text."""
    found = connect().call("GET", "/api/keys")["keys"]
    if not as_json:
        found = [{**key, "created": when(key["created"]), "revoked": when(key["revoked"])} for key in found]
    rows(found, ["id", "name", "role", "hint", "created", "revoked"], as_json=as_json, empty="No keys.")


@app.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(help="The key's id, as 'list' shows it.")]) -> None:
    """Make a key invalid, within a few seconds everywhere."""
    connect().call("DELETE", "/api/keys/{}", key)
    print(f"Revoked {key}.")


@app.command("reset-admin")
def reset_admin() -> None:
    """Make a new admin key in place of a lost one. It needs the database, not a key."""
    from localai_q.config import settings
    from localai_q.services.keys import reset_admin as reset
    from localai_q.services.wiring import connect as wire

    print(f"The new admin key lies in {reset(wire(settings()))}")
