"""`localai-q jobs`: what was asked, what became of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import typer

from localai_q.cli.client import Api, Record, connect
from localai_q.cli.show import AsJson, rows, when
from localai_q.cli.watch import display
from localai_q.cluster.events import End, Event, Progress
from localai_q.cluster.joblog import Lines, shown
from localai_q.cluster.jobs import is_pause
from localai_q.errors import InvalidValue, Unavailable, from_record

app = typer.Typer(no_args_is_help=True, help="List, show, watch, pause, retry, cancel and prune jobs.")

POLL = 0.3  # seconds between two looks at a job

JobId = Annotated[str, typer.Argument(help="The job's id, as 'list' shows it.")]


@app.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="Only open, done, failed or cancelled ones; a comma separates.")] = "",
    kind: Annotated[str, typer.Option(help="Only of these kinds, as chat or install_backend; a comma separates.")] = "",
    node: Annotated[str, typer.Option(help="Only those of this node.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show jobs, the newest first."""
    wanted = {"state": state, "kind": kind, "node": node, "limit": limit}
    found = connect().call("GET", "/api/jobs", params=wanted)["jobs"]
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


@app.command("log")
def show_log(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; ends as 'watch'.")] = False,
) -> None:
    """Show what a node has said of its work. It is kept as long as the job is."""
    api = connect()
    if follow and api.call("GET", "/api/jobs/{}", job)["state"] == "open":
        for line in _lines(api, job):
            print(shown(line), flush=True)
    else:
        with api.errors():
            answer = api.http.get(f"/api/jobs/{quote(job, safe='')}/log")
        api.check(answer)
        print(answer.text, end="")
    if follow:
        need_done(wait(api, job, quiet=True))


@app.command("pause")
def pause_job(job: JobId) -> None:
    """Stop a download and keep what has come of it; 'retry' goes on with that. What needs the file waits."""
    connect().call("POST", "/api/jobs/{}/pause", job)
    print(f"{job}: paused. To go on: localai-q jobs retry {job}")


@app.command("retry")
def retry_job(job: JobId) -> None:
    """Have a node do again what has failed or was cancelled, or go on with what was paused; prints the new job's id."""
    print(connect().call("POST", "/api/jobs/{}/retry", job)["jobID"])


@app.command("cancel")
def cancel_job(job: JobId) -> None:
    """Cancel a job that waits or runs."""
    print(f"{job}: {connect().call('DELETE', '/api/jobs/{}', job)['state']}")


@app.command("prune")
def prune_jobs(
    older: Annotated[str, typer.Option(help="How long ago they ended at least: 90s, 30m, 12h or 30d.")],
    state: Annotated[str, typer.Option(help="Only done, failed or cancelled ones; a comma separates.")] = "",
    kind: Annotated[str, typer.Option(help="Only of these kinds; a comma separates.")] = "",
) -> None:
    """Forget jobs that have ended, with their logs."""
    body = {"older_than": _seconds(older), "states": _parts(state), "kinds": _parts(kind)}
    print(f"Removed {connect().call('POST', '/api/jobs/prune', json=body)['removed']} jobs.")


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
        job = api.call("GET", "/api/jobs/{}", job_id)
        while job["state"] == "open":
            if not quiet:
                shown.show([job])
            time.sleep(POLL)
            job = api.follow("/api/jobs/{}", job_id)
    return job


def need_done(job: Record) -> Record:
    """The job, or the error that it has ended with."""
    if job["state"] != "done":
        raise from_record(job["error"] or {})
    return job


def _lines(api: Api, job_id: str) -> Iterator[str]:
    """What a job says, until it ends; a connection that ends early is made again where it was."""
    lines, place = Lines(), ""
    while True:
        try:
            for at, event in _events(api, job_id, place):
                place = at
                attempt = re.fullmatch(r".*:([0-9]+)-[0-9]+", place)
                yield from lines.of(int(attempt[1]) if attempt else 1, event)
                if isinstance(event, End):
                    return
        except Unavailable:
            api.follow("/api/jobs/{}", job_id)  # until the API is back
        time.sleep(POLL)


def _events(api: Api, job_id: str, place: str) -> Iterator[tuple[str, Event]]:
    """What one connection tells of a job behind a place, each event with its own place."""
    headers = {"Last-Event-ID": place} if place else {}
    with api.errors(), api.http.stream("GET", f"/api/jobs/{quote(job_id, safe='')}/events", headers=headers) as told:
        api.check(told)
        for line in told.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                place = value
            elif name == "data":
                if "error" in (said := json.loads(value)) and "type" not in said:
                    return  # the API has lost sight of it; if it is not to be had, the next try says so
                yield place, _event(said)


def _event(told: Record) -> Event:
    kind = told.pop("type")
    return End(**told) if kind == "end" else Progress(**told)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if not found:
        raise InvalidValue(f"--older needs a number with s, m, h or d behind it, as 30d, not {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}[found[2]]


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    progress = job["progress"]
    live = {"waiting": "waiting", "leased": "running"}.get(job["live"] or "", job["state"])
    return {
        **job,
        "subject": job["subject"] or job["model"],
        "state": live if job["state"] == "open" else "paused" if is_pause(job["error"]) else job["state"],
        "created": when(job["created"]),
        "progress": f"{progress['stage']} {progress['done']:.0f}/{progress['total']:.0f}" if progress else None,
        "error": (job["error"] or {}).get("message"),
    }
