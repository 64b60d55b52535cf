"""`localai-q jobs`: what was asked, what became of it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from localai_q.cli.client import connect
from localai_q.cli.show import AsJson, rows, when

app = typer.Typer(no_args_is_help=True, help="List, show and cancel jobs.")

JobId = Annotated[str, typer.Argument(help="The job's id, as 'list' shows it.")]


@app.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="Only open, done, failed or cancelled ones; a comma separates.")] = "",
    kind: Annotated[str, typer.Option(help="Only chat, completion, embedding, install_backend, fetch_model.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show jobs, the newest first."""
    found = connect().call("GET", "/api/jobs", params={"state": state, "kind": kind, "limit": limit})["jobs"]
    shown = found if as_json else [_shown(job) for job in found]
    rows(
        shown,
        ["id", "kind", "state", "model", "node", "progress", "created", "error"],
        as_json=as_json,
        empty="No jobs.",
    )


@app.command("show")
def show_job(job: JobId) -> None:
    """Show everything about a job, as JSON."""
    print(json.dumps(connect().call("GET", "/api/jobs/{}", job), indent=2))


@app.command("cancel")
def cancel_job(job: JobId) -> None:
    """Cancel a job that waits or runs."""
    print(f"{job}: {connect().call('DELETE', '/api/jobs/{}', job)['state']}")


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    progress = job["progress"]
    live = {"waiting": "waiting", "leased": "running"}.get(job["live"] or "", job["state"])
    return {
        **job,
        "state": live if job["state"] == "open" else job["state"],
        "created": when(job["created"]),
        "progress": f"{progress['stage']} {progress['done']:.0f}/{progress['total']:.0f}" if progress else None,
        "error": (job["error"] or {}).get("message"),
    }
