"""The same jobs with plain Celery, for comparison: `acks_late=True`, two prefork workers, otherwise its defaults.

A task publishes its numbered tokens on a channel of its own; the client subscribes to all of them and collects. The
broker, which keeps the results too, is the embedded Valkey with its append-only file, as the cluster's is. What dies is
started again by the supervisor that `localai-q up` uses.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kombu.exceptions
import psutil
import redis
from celery import Celery

from bench.cluster import end_on_sigterm, undisturbed
from bench.tally import COMES_BACK, ON_ITS_WAY, TALKING, Plan, Strike, Tally
from localai_q import ports
from localai_q.embedded.valkey import Valkey
from localai_q.supervisor import Spec, Supervisor, command_spec

ROOT = Path(__file__).resolve().parents[1]
VICTIMS = {"replica": "child", "backend": "child", "web": "child", "node": "main", "control": "main",
           "valkey": "broker", "postgres": "broker"}  # fmt: skip
NAMES = {"child": "a worker's child", "main": "a worker", "broker": "valkey"}

app = Celery("plain", broker=os.environ.get("BENCH_BROKER"), backend=os.environ.get("BENCH_BROKER"))
app.conf.task_acks_late = True


@app.task(name="count")
def count(job: str, tokens: int, delay: float) -> None:
    """Say 0 to tokens-1, one every `delay` seconds; each message names the process that says it."""
    client = redis.Redis.from_url(os.environ["BENCH_BROKER"])
    for number in range(tokens):
        client.publish(f"gen:{job}", f"{os.getpid()} {number}")
        time.sleep(delay)
    client.publish(f"gen:{job}", f"{os.getpid()} end")


@dataclass
class Heard:
    """One job as its client sees it."""

    words: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def talks(self) -> bool:
        """Whether it says something right now."""
        return bool(self.times) and not self.ended and self.times[-1] > time.monotonic() - TALKING


class Listener:
    """The client's ear: everything that is published, by job. It connects again when the broker comes back."""

    def __init__(self, url: str) -> None:
        self.heard: dict[str, Heard] = {}
        self._url = url
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with suppress(redis.RedisError, OSError):
                pubsub = redis.Redis.from_url(self._url, decode_responses=True).pubsub(ignore_subscribe_messages=True)
                pubsub.psubscribe("gen:*")
                for message in pubsub.listen():
                    self._note(message["channel"].removeprefix("gen:"), *message["data"].split())
            time.sleep(0.2)

    def _note(self, job: str, pid: str, said: str) -> None:
        heard = self.heard.setdefault(job, Heard())
        if said == "end":
            heard.ended = True
        else:
            heard.times.append(time.monotonic())
            heard.words.append(int(said))
            heard.pids.append(int(pid))


@contextmanager
def workers(slots: int) -> Iterator[tuple[str, Supervisor]]:
    """A broker and two workers of so many slots each: the broker's URL, and who keeps them running."""
    end_on_sigterm()
    home = Path(tempfile.mkdtemp(prefix="lqplain"))
    valkey = Valkey(home, port=ports.choose(), password="plain")
    supervisor = Supervisor(lambda line: None)
    env = {name: value for name, value in os.environ.items() if not name.startswith("LOCALAI_")}
    env |= {"BENCH_BROKER": valkey.url, "PYTHONPATH": str(ROOT)}
    celery = str(Path(sys.executable).with_name("celery"))
    try:
        supervisor.add(Spec("valkey", valkey.start, valkey.log, 10))
        valkey.wait_ready()
        for name in ("one", "two"):
            argv = [celery, "-A", "bench.plain", "worker", "-c", str(slots), "-n", f"{name}@bench"]
            supervisor.add(command_spec(name, argv, env=env, logs=home / "logs", cwd=home))
        yield valkey.url, supervisor
    finally:
        with undisturbed():
            supervisor.stop()
            shutil.rmtree(home, ignore_errors=True)


def run(plan: Plan, slots: int) -> Tally:
    """Carry out the plan."""
    tally = Tally()
    with workers(slots) as (url, supervisor):
        listener = Listener(url)
        sender = Celery("client", broker=url)  # without results: asking for them is another connection that can break
        _warm_up(sender, listener)
        started = time.monotonic()
        strikes: list[Strike] = []
        killer = threading.Thread(target=_kill, args=(plan, started, supervisor, listener, strikes), daemon=True)
        killer.start()
        for number, moment in enumerate(plan.arrivals):
            time.sleep(max(started + moment - time.monotonic(), 0.0))
            _send(sender, f"job{number}", plan, tally)
        killer.join()
        jobs = [listener.heard.setdefault(f"job{number}", Heard()) for number in range(plan.jobs)]
        until = time.monotonic() + plan.patience
        while time.monotonic() < until and not all(job.ended for job in jobs):
            time.sleep(0.2)
        tally.seconds = time.monotonic() - started
        _count(tally, plan, jobs, strikes, Celery("results", broker=url, backend=url))
    return tally


def _warm_up(sender: Celery, listener: Listener) -> None:
    """Until both workers take tasks."""
    for number in range(8):
        sender.send_task("count", (f"warm{number}", 1, 0.2))
    deadline = time.monotonic() + 60
    while sum(heard.ended for heard in listener.heard.values()) < 8:
        if time.monotonic() > deadline:
            raise RuntimeError("plain Celery did not start")
        time.sleep(0.1)


def _send(sender: Celery, job: str, plan: Plan, tally: Tally) -> None:
    while True:
        try:
            sender.send_task("count", (job, plan.tokens, plan.delay), task_id=job)
        except (kombu.exceptions.OperationalError, redis.RedisError, OSError):
            tally.refused += 1
            time.sleep(0.2)
        else:
            tally.accepted += 1
            return


def _kill(plan: Plan, started: float, supervisor: Supervisor, listener: Listener, strikes: list[Strike]) -> None:
    """Strike at the plan's moments, and note whom that hit."""
    for moment, what, choice in plan.kills:
        time.sleep(max(started + moment - time.monotonic(), 0.0))
        role = VICTIMS[what]
        deadline = time.monotonic() + COMES_BACK
        while (found := _victim(role, supervisor, choice)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if found is None:
            continue
        victim, speakers = found
        talking = [heard for heard in list(listener.heard.values()) if heard.talks]
        hit = [heard for heard in talking if speakers is None or heard.pids[-1] in speakers]
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        strikes.append(Strike(NAMES[role], time.monotonic(), hit))


def _victim(role: str, supervisor: Supervisor, choice: int) -> tuple[int, set[int] | None] | None:
    """Whom to kill, and the processes whose streams that ends (None: all); None while there is no such process."""
    pid = supervisor.pid("valkey" if role == "broker" else ("one", "two")[choice % 2])
    if pid is None or role == "broker":
        return (pid, None) if pid else None
    try:
        children = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    if not children:
        return None
    if role == "main":
        return pid, set(children)
    child = random.Random(choice).choice(children)
    return child, {child}


def _count(tally: Tally, plan: Plan, jobs: list[Heard], strikes: list[Strike], results: Celery) -> None:
    for number, heard in enumerate(jobs):
        tally.judge(heard.words, plan.tokens, done=heard.ended)
        if heard.ended:
            tally.done += 1
            tally.continued += len(set(heard.pids)) > 1
        elif reason := _failure(results, f"job{number}"):
            tally.failed[reason] += 1
        else:
            tally.lost += 1
    for strike in strikes:
        tally.struck[strike.what] += 1
        for heard in strike.hit:
            if not heard.ended or heard.times[-1] > strike.at + ON_ITS_WAY:
                tally.note_gap(strike, heard.times)


def _failure(results: Celery, job: str) -> str:
    """Why the task failed, if its result says so."""
    found: Any = results.AsyncResult(job)
    with suppress(redis.RedisError, OSError):
        if found.state == "FAILURE":
            return f"{type(found.result).__name__}"
    return ""
