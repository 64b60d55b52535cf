"""Jobs under random kills: `python -m bench.chaos`.

A cluster of two nodes is asked for many jobs, streaming and not, while its processes are killed with SIGKILL one after
the other: replica, backend, node, control, web, Valkey. `localai-q up` starts them again. The clients come back with
`Last-Event-ID`, and send again what was refused. Then the same jobs and the same moments with plain Celery
(`acks_late=True`, otherwise its defaults): workers, their children and the broker are killed and started again.

Every job that was accepted must have ended once and said each token once, in order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg2
import redis

from bench import plain
from bench.clients import Asked, anonymous
from bench.cluster import Cluster, running
from bench.tally import COMES_BACK, ON_ITS_WAY, Plan, Strike, Tally, make_plan, table

VICTIMS = ["replica", "backend", "node", "control", "web", "valkey"]
SETTINGS = {"LOCALAI_Q_LEASE": "2", "LOCALAI_HEARTBEAT_INTERVAL": "1"}
OURS, THEIRS = "this cluster", "plain Celery, acks_late"


def run(plan: Plan, slots: int) -> Tally:
    """Carry out the plan on a cluster."""
    tally = Tally()
    with running(2, **SETTINGS) as cluster:
        cluster.add_model("echo", replicas=2, backend="echo", slots=slots)
        started = time.monotonic()
        last = max(plan.arrivals[-1], plan.kills[-1][0] if plan.kills else 0.0)
        until = started + last + plan.patience
        jobs = [Asked(kind, plan.tokens, 1000 * plan.delay) for kind in plan.kinds]
        strikes: list[Strike] = []
        killer = threading.Thread(target=_kill, args=(plan, started, cluster, jobs, strikes), daemon=True)
        killer.start()
        threads = _ask(plan, started, cluster, jobs, until)
        killer.join()
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0.0) + 1.0)
        tally.seconds = time.monotonic() - started
        _wait_for_rows(cluster, until)
        _count(tally, cluster, jobs)
    for strike in strikes:
        tally.struck[strike.what] += 1
        for job in strike.hit:
            if job.outcome != "done" or job.said[-1] > strike.at + ON_ITS_WAY:  # else it had said everything already
                tally.note_gap(strike, job.said)
    return tally


def _ask(plan: Plan, started: float, cluster: Cluster, jobs: list[Asked], until: float) -> list[threading.Thread]:
    """Send each job at its moment, each in a thread of its own."""
    threads = []
    for job, moment in zip(jobs, plan.arrivals, strict=True):
        time.sleep(max(started + moment - time.monotonic(), 0.0))
        threads.append(threading.Thread(target=job.run, args=(cluster, until), daemon=True))
        threads[-1].start()
    return threads


def _kill(plan: Plan, started: float, cluster: Cluster, jobs: list[Asked], strikes: list[Strike]) -> None:
    """Strike at the plan's moments, and note whom that hit."""
    for number, (moment, what, choice) in enumerate(plan.kills, start=1):
        time.sleep(max(started + moment - time.monotonic(), 0.0))
        victims = _victims(cluster, what, choice)
        hit = _speakers(cluster, what, victims, jobs)
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        strikes.append(Strike(what, time.monotonic(), hit))
        ended = sum(bool(job.outcome) for job in jobs)
        print(f"  {time.monotonic() - started:5.1f} s  kill {number}: {what}, {len(hit)} streams hit; {ended} jobs "
              "ended", file=sys.stderr)  # fmt: skip


def _victims(cluster: Cluster, what: str, choice: int) -> list[psutil.Process]:
    """Whom to kill: of the web all its processes, of Postgres its server, else one."""
    deadline = time.monotonic() + COMES_BACK
    while not (found := cluster.processes().get(what, [])):
        if time.monotonic() > deadline:
            return []
        time.sleep(0.1)
    if what == "web":
        return found
    return [found[0 if what == "postgres" else choice % len(found)]]


def _speakers(cluster: Cluster, what: str, victims: list[psutil.Process], jobs: list[Asked]) -> list[Asked]:
    """The streams that this kill hits: those that its victim works on, or that come through it."""
    speaking = [job for job in jobs if job.talks]
    if not victims or what in ("control", "postgres"):
        return []
    if what in ("web", "valkey"):
        return speaking
    try:
        name = victims[0].environ().get("LOCALAI_NODE_NAME")
        names = dict(cluster.sql("SELECT id, name FROM nodes"))
        pipe = cluster.redis().pipeline(transaction=False)
        for job in speaking:
            pipe.hget(f"job:{job.job}", "node")
        return [job for job, node in zip(speaking, pipe.execute(), strict=True) if names.get(node) == name]
    except (redis.RedisError, psycopg2.Error, psutil.Error):
        return []


def _wait_for_rows(cluster: Cluster, until: float) -> None:
    """Until each job's end is written down, or the patience is over."""
    until = max(until, time.monotonic() + 5.0)
    while time.monotonic() < until:
        with suppress(psycopg2.Error):  # it may be what was killed last
            if not cluster.sql("SELECT 1 FROM jobs WHERE state = 'open' AND kind = 'chat' LIMIT 1"):
                return
        time.sleep(0.5)


def _count(tally: Tally, cluster: Cluster, jobs: list[Asked]) -> None:
    """Compare what the clients saw with what was written down."""
    rows = {row[0]: row[1:] for row in cluster.sql("SELECT id, state, attempt, error FROM jobs WHERE kind = 'chat'")}
    for job in jobs:
        tally.refused += job.refused
        tally.unheard += job.unheard
        tally.resumed += job.resumed
        state, attempt, error = rows.pop(job.job, ("", 0, None)) if job.job else ("", 0, None)
        if not job.job and not job.outcome:
            continue  # it was never accepted
        tally.accepted += 1
        tally.judge(job.words, job.tokens, done=job.outcome == "done")
        tally.twice += job.out_of_order
        if job.outcome == "done" and state == "done":
            tally.done += 1
            tally.continued += attempt > 1
        elif state == "cancelled":
            tally.cancelled += 1
        elif job.outcome == "failed":
            tally.failed[job.reason + ("" if state != "done" else " (and yet it was done)")] += 1
        elif state == "failed":  # with a status that says to try again: its client never learns better
            tally.failed["its client was told to come back, for ever: " + anonymous(error["message"])] += 1
        else:
            tally.lost += 1
            print(f"  lost: {job} {state}", file=sys.stderr)
    for state, _, error in rows.values():
        tally.unheard_states[f"{state}: {anonymous(error['message'])}" if error else state] += 1


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="chooses the victims and the moments; kinds of jobs, too")
    parser.add_argument("--rate", type=float, default=6.0, help="jobs that arrive in a second")
    parser.add_argument("--tokens", type=int, default=40, help="of each job")
    parser.add_argument("--delay-ms", type=float, default=40.0, help="between two tokens of a job")
    parser.add_argument("--slots", type=int, default=8, help="of each of the two nodes, or of plain Celery's workers")
    parser.add_argument("--victims", nargs="+", default=VICTIMS, choices=[*VICTIMS, "postgres"], metavar="VICTIM",
                        help="what is killed, in turns: %(default)s; also: postgres")  # fmt: skip
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after the last kill and the last job at "
                        "which what has not ended counts as lost")  # fmt: skip
    parser.add_argument("--only", choices=["ours", "plain"], help="one of the two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args()
    plan = make_plan(jobs=options.jobs, kills=options.kills, rate=options.rate, tokens=options.tokens,
                     delay=options.delay_ms / 1000, victims=options.victims, seed=options.seed,
                     patience=options.patience)  # fmt: skip
    load = plan.jobs / plan.arrivals[-1] * plan.tokens * plan.delay / (2 * options.slots)
    print(f"{plan.jobs} jobs of {plan.tokens} tokens, {load:.0%} of {2 * options.slots} slots; {options.kills} kills; "
          f"seed {options.seed}")  # fmt: skip
    columns = {}
    if options.only != "plain":
        columns[OURS] = run(plan, options.slots)
    if options.only != "ours":
        columns[THEIRS] = plain.run(plan, options.slots)
    print(table(columns))
    print(f"Lost is what had not ended {plan.patience:.0f} s after the last kill and the last job.\nPlain Celery delivers "
          "again what a dead worker held, but after its visibility timeout: an hour by default.")  # fmt: skip
    if options.json:
        found = {name: tally.to_json() for name, tally in columns.items()}
        options.json.write_text(json.dumps({"options": vars(options) | {"json": ""}, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
