"""`localai-q jobs`: what was asked, what became of it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from localai_q.cli.client import Api, Record, connect
from localai_q.cli.show import AsJson, rows, when
from localai_q.cli.watch import display
from localai_q.errors import from_record

app = typer.Typer(no_args_is_help=True, help="List, show, watch, retry and cancel jobs.")

POLL = 0.3  # seconds between two looks at a job

JobId = Annotated[str, typer.Argument(help="The job's id, as 'list' shows it.")]


@app.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="Only open, done, failed or cancelled ones; a comma separates.")] = "",
    kind: Annotated[str, typer.Option(help="Only of these kinds, as chat or install_backend; a comma separates.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show jobs, the newest first."""
    found = connect().call("GET", "/api/jobs", params={"state": state, "kind": kind, "limit": limit})["jobs"]
    shown = found if as_json else [_shown(job) for job in found]
    rows(
        shown,
        ["id", "kind", "state", "subject", "node", "progress", "created", "error"],
        as_json=as_json,
        empty="No jobs.",
    )


@app.command("show")
def show_job(job: JobId) -> None:
    """Show everything about a job, as JSON."""
    print(json.dumps(connect().call("GET", "/api/jobs/{}", job), indent=2))


@app.command("watch")
def watch_job(job: JobId, as_json: AsJson = False) -> None:
    """Show how far a job is until it ends: with 0 if it is done, with 1 if it failed or was cancelled."""
    follow(connect(), job, as_json=as_json)


@app.command("retry")
def retry_job(job: JobId) -> None:
    """Have a node do again what has failed or was cancelled; prints the id of the new job."""
    print(connect().call("POST", "/api/jobs/{}/retry", job)["jobID"])


@app.command("cancel")
def cancel_job(job: JobId) -> None:
    """Cancel a job that waits or runs."""
    print(f"{job}: {connect().call('DELETE', '/api/jobs/{}', job)['state']}")


def follow(api: Api, job_id: str, *, as_json: bool = False) -> None:
    """Show a job's progress until it ends, and what it has ended with.

    Raises:
        LocalAIError: it has failed or was cancelled, with its reason.
    """
    job = wait(api, job_id, quiet=as_json)
    if as_json:
        print(json.dumps(job, indent=2))
    need_done(job)
    if not as_json:
        print(f"{job_id}: done")


def wait(api: Api, job_id: str, *, quiet: bool) -> Record:
    """The job, once it has ended; until then its progress is shown, unless this is to be quiet."""
    with display() as shown:
        while (job := api.call("GET", "/api/jobs/{}", job_id))["state"] == "open":
            if not quiet:
                shown.show([job])
            time.sleep(POLL)
    return job


def need_done(job: Record) -> Record:
    """The job, or the error that it has ended with."""
    if job["state"] != "done":
        raise from_record(job["error"] or {})
    return job


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    progress = job["progress"]
    live = {"waiting": "waiting", "leased": "running"}.get(job["live"] or "", job["state"])
    return {
        **job,
        "subject": job["model"] or job["subject"],
        "state": live if job["state"] == "open" else job["state"],
        "created": when(job["created"]),
        "progress": f"{progress['stage']} {progress['done']:.0f}/{progress['total']:.0f}" if progress else None,
        "error": (job["error"] or {}).get("message"),
    }
