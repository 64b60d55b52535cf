"""What Celery and kombu need to be sound on Redis, proven on real workers: full slots, no hoarding, restarts of the
broker, garbage on the queue, a consumer that has gone deaf. Where a guard could be left out unnoticed, a second test shows what happens without it.
"""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from waiting import LIMIT, wait_for

from localai_q import names, ports
from localai_q.bus import probe, safe_transport
from localai_q.embedded.valkey import Valkey

QUEUE = "tiny"
SLOTS = 4
CELERY = [str(Path(sys.executable).with_name("celery")), "-A", "tiny_app", "worker", "-n", "tiny@test", "-l", "WARNING"]


class Worker:
    """A worker process and what it has written."""

    def __init__(self, url: str, log: Path, **environment: str) -> None:
        env = {**os.environ, "LOCALAI_REDIS_URL": url, **environment}
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                CELERY, cwd=Path(__file__).parent, env=env, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        if not self.ended():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    """A Valkey of this test's own."""
    server = Valkey(tmp_path, port=ports.choose(), password="")
    server.start()
    server.wait_ready()
    yield server
    server.stop(2.0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts workers, and ends them after the test."""
    started: list[Worker] = []

    def begin(url: str, **environment: str) -> Worker:
        started.append(Worker(url, tmp_path / f"worker-{len(started)}.log", **environment))
        return started[-1]

    yield begin
    for worker in started:
        worker.kill()


def item(task: str, argument: str, **changes: object) -> dict:
    """A message as Celery sends it."""
    body = base64.b64encode(json.dumps([[argument], {}, {}]).encode()).decode()
    made = names.new_id()
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": made, "root_id": made, "parent_id": None, "retries": 0},
        "properties": {
            "correlation_id": made,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": made,
        },
        **changes,
    }


def send(client: redis.Redis, task: str, *arguments: str) -> None:
    client.lpush(QUEUE, *[json.dumps(item(task, argument)) for argument in arguments])


def works(client: redis.Redis, worker: Worker, name: str) -> bool:
    """Whether this very process does a new task."""
    send(client, "tiny.mark", name)
    return wait_for(lambda: worker.ended() or client.get(f"mark:{name}")) == str(worker.process.pid)


def test_a_worker_takes_as_many_messages_as_it_has_slots_and_leaves_the_rest_to_others(
    valkey: Valkey, redis_client: redis.Redis, start
) -> None:
    worker = start(valkey.url)
    assert works(redis_client, worker, "up")
    assert wait_for(lambda: redis_client.llen(QUEUE) == 0)
    tasks = [str(number) for number in range(40)]
    send(redis_client, "tiny.work", *tasks)
    assert wait_for(lambda: worker.ended() or redis_client.llen("ended") == len(tasks))
    assert not worker.ended(), worker.said
    looks = [[int(number) for number in each.split()] for each in redis_client.lrange("seen", 0, -1)]
    most = max(len(tasks) - waiting - ended for waiting, ended in looks)
    # One message may be on its way while the ended task that made room for it has not written its mark yet.
    assert SLOTS <= most <= SLOTS + 1
    assert redis_client.scard("running") == 0


def test_a_worker_that_is_held_up_takes_exactly_its_slots(valkey: Valkey, redis_client: redis.Redis, start) -> None:
    worker = start(valkey.url)
    tasks = [f"h{number}" for number in range(40)]
    send(redis_client, "tiny.hold", *tasks)
    assert wait_for(lambda: len(redis_client.keys("held:*")) == SLOTS), worker.said
    assert not wait_for(lambda: redis_client.llen(QUEUE) < len(tasks) - SLOTS, 1.0)
    assert redis_client.llen(QUEUE) == len(tasks) - SLOTS


@pytest.mark.parametrize("hook", ["1", "0"])
def test_the_wake_hook_alone_fills_a_slot_when_a_task_ends_and_without_it_a_full_worker_stalls(
    valkey: Valkey, redis_client: redis.Redis, start, hook: str
) -> None:
    # The sending of task events happens to wake the loop as well, and so does the clock, sooner or later.
    worker = start(valkey.url, TINY_EVENTS="0", TINY_CLOCK="0", TINY_HOOK=hook)
    tasks = [str(number) for number in range(24)]
    send(redis_client, "tiny.work", *tasks)
    assert wait_for(lambda: redis_client.llen("ended") >= SLOTS), worker.said
    if hook == "1":
        assert wait_for(lambda: redis_client.llen("ended") == len(tasks)), worker.said
    else:
        assert not wait_for(lambda: redis_client.llen("ended") > 2 * SLOTS, 2.0)


def restart(broker: Valkey) -> None:
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.process.wait(LIMIT)
    broker.start()
    broker.wait_ready()


@pytest.mark.parametrize("task", ["tiny.hold", "tiny.hold_late"])
def test_a_worker_outlives_the_broker_while_tasks_run_and_while_it_is_idle(broker: Valkey, start, task: str) -> None:
    client = redis.Redis.from_url(broker.url, decode_responses=True)
    worker = start(broker.url)
    send(client, task, "a", "b")  # two slots busy, two free
    assert wait_for(lambda: client.exists("held:a", "held:b") == 2), worker.said
    restart(broker)
    assert works(client, worker, "while-tasks-ran"), worker.said
    client.set("release:a", 1)
    client.set("release:b", 1)
    assert wait_for(lambda: client.exists("held:a", "held:b") == 0)
    restart(broker)
    assert works(client, worker, "while-idle"), worker.said
    assert psutil.Process(worker.process.pid).is_running()
    client.close()


def test_messages_that_waited_when_the_broker_died_are_done_once_it_is_back(broker: Valkey, start) -> None:
    client = redis.Redis.from_url(broker.url, decode_responses=True)
    send(client, "tiny.work", *[str(number) for number in range(12)])
    client.execute_command("WAITAOF", 1, 0, 5000)  # what is written within the last second may be lost, by our settings
    restart(broker)
    worker = start(broker.url)
    assert wait_for(lambda: client.llen("ended") == 12), worker.said
    client.close()


def changed(**changes: object) -> bytes:
    return json.dumps(item("tiny.mark", "garbage", **changes)).encode()


def without(*path: str) -> bytes:
    made = item("tiny.mark", "garbage")
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return json.dumps(made).encode()


def header(**changes: object) -> bytes:
    made = item("tiny.mark", "garbage")
    made["headers"] |= changes
    return json.dumps(made).encode()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


GARBAGE: dict[str, bytes] = {
    "not JSON": b"\x00\x01 this is not JSON",
    "empty": b"",
    "invalid UTF-8": b'{"body": "\xff\xfe"}',
    "a number": b"42",
    "null": b"null",
    "a string": b'"words"',
    "a list": b"[1, 2, 3]",
    "an empty object": b"{}",
    "deeply nested": b"[" * 100_000 + b"]" * 100_000,
    "larger than any of ours": changed(body=encoded("x" * 400_000)),
    "no body": without("body"),
    "no properties": without("properties"),
    "no headers": without("headers"),
    "no delivery tag": without("properties", "delivery_tag"),
    "no delivery information": without("properties", "delivery_info"),
    "no content type": without("content-type"),
    "a body that is no base64": changed(body="!!! no base64 !!!"),
    "a body that is no UTF-8": changed(body=base64.b64encode(b"\xff\xfe\xff").decode()),
    "a body that is no JSON": changed(body=encoded("{no json")),
    "a body that is a number": changed(body=encoded("7")),
    "a body with one part": changed(body=encoded('[["x"]]')),
    "a body whose parts have the wrong types": changed(body=encoded('["x", [], 3]')),
    "a deeply nested body": changed(body=encoded("[" * 50_000 + "]" * 50_000)),
    "a body of another encoding": changed(properties={**item("t", "x")["properties"], "body_encoding": "rot13"}),
    "pickle": changed(**{"content-type": "application/x-python-serialize"}),
    "a value of an unknown type": b'{"__type__": "datetime", "__value__": "never"}',
    "no task": without("headers", "task"),
    "no id": without("headers", "id"),
    "a task that is a list": header(task=["tiny.mark"]),
    "a compressed body": header(compression="zlib"),
    "an eta that is none": header(eta="the day after"),
    "an expiry that is none": header(expires={"a": 1}),
    "time limits that are none": header(timelimit=7),
}
REJECTED_BY_CELERY = {"an eta that is none", "an expiry that is none", "time limits that are none"}


def test_no_garbage_on_the_queue_ends_a_worker_or_keeps_it_from_its_work(
    valkey: Valkey, redis_client: redis.Redis, start
) -> None:
    worker = start(valkey.url)
    assert works(redis_client, worker, "up")
    dead = names.dead_letters(QUEUE)
    raw = redis.Redis.from_url(valkey.url)
    for number, (what, garbage) in enumerate(GARBAGE.items()):
        before = redis_client.llen(dead)
        raw.lpush(QUEUE, garbage)
        assert works(redis_client, worker, f"after-{number}"), f"{what}: {worker.said[-3000:]}"
        if what not in REJECTED_BY_CELERY:
            assert redis_client.llen(dead) == before + 1, what
            assert len(raw.lindex(dead, 0)) <= safe_transport.LARGEST
    send(redis_client, "tiny.nobody_knows", "x")
    assert works(redis_client, worker, "after-an-unknown-task")
    assert redis_client.get("mark:garbage") is None
    assert redis_client.llen(QUEUE) == 0
    assert redis_client.hlen("unacked") == 0
    raw.close()


def test_without_the_checked_transport_one_item_of_garbage_ends_a_worker(
    valkey: Valkey, redis_client: redis.Redis, start
) -> None:
    worker = start(valkey.url, TINY_SAFE="0")
    assert works(redis_client, worker, "up")
    redis_client.lpush(QUEUE, "42")
    assert wait_for(worker.ended), worker.said


def test_only_the_newest_dead_letters_are_kept(valkey: Valkey, redis_client: redis.Redis, start) -> None:
    dead = names.dead_letters(QUEUE)
    redis_client.lpush(dead, *["old"] * safe_transport.KEPT)
    redis_client.lpush(QUEUE, "garbage one", "garbage two")
    worker = start(valkey.url)
    assert works(redis_client, worker, "up")
    assert redis_client.lrange(dead, 0, 2) == ["garbage two", "garbage one", "old"]
    assert redis_client.llen(dead) == safe_transport.KEPT


@pytest.mark.parametrize("how", ["quietly", "hang"])
def test_a_worker_that_is_connected_and_takes_nothing_finds_that_out_and_ends(
    valkey: Valkey, redis_client: redis.Redis, start, how: str
) -> None:
    worker = start(valkey.url, TINY_PROBE="1,2")
    assert works(redis_client, worker, "up")
    send(redis_client, "tiny.deafen", how)
    assert wait_for(worker.ended), worker.said
    assert redis_client.get("deaf") == "the worker is connected to Redis and takes nothing from tiny"
    assert redis_client.llen(QUEUE) == 1, "one message to itself at a time"
    assert 0 < redis_client.ttl(QUEUE) <= probe.LEFT, "nobody may ever take it"
    assert works(redis_client, start(valkey.url), "the next")
    assert redis_client.llen(QUEUE) == 0


def found_sound(client: redis.Redis, worker: Worker) -> bool:
    """Whether the worker takes two more of the messages that it leaves to itself."""
    key = f"done:{names.PROBE}"
    before = int(client.get(key) or 0)
    return wait_for(lambda: worker.ended() or int(client.get(key) or 0) > before + 1) and not worker.ended()


def test_a_healthy_worker_is_left_alone_whether_it_is_idle_busy_or_full(
    valkey: Valkey, redis_client: redis.Redis, start
) -> None:
    worker = start(valkey.url, TINY_PROBE="1,6")
    assert works(redis_client, worker, "up")
    assert found_sound(redis_client, worker), "idle"
    send(redis_client, "tiny.hold", "a")
    assert wait_for(lambda: redis_client.exists("held:a"))
    assert found_sound(redis_client, worker), "busy"
    send(redis_client, "tiny.hold", "b", "c", "d", "e")
    assert not wait_for(worker.ended, 8), "full"
    assert redis_client.llen(QUEUE) == 1
    redis_client.mset({f"release:{name}": 1 for name in "abcde"})
    assert works(redis_client, worker, "again")
    assert redis_client.get("deaf") is None


def test_a_restart_of_the_broker_makes_no_idle_worker_end(broker: Valkey, start) -> None:
    client = redis.Redis.from_url(broker.url, decode_responses=True)
    worker = start(broker.url, TINY_PROBE="1,8")
    assert works(client, worker, "up")
    for _ in range(2):
        restart(broker)
        assert not wait_for(worker.ended, 4), worker.said
    os.kill(broker.process.pid, signal.SIGSTOP)
    assert not wait_for(worker.ended, 12), "Redis did not answer"
    os.kill(broker.process.pid, signal.SIGCONT)
    assert works(client, worker, "afterwards"), worker.said
    assert client.get("deaf") is None
    client.close()


def test_a_worker_that_was_suspended_does_not_take_its_own_sleep_for_deafness(
    valkey: Valkey, redis_client: redis.Redis, start
) -> None:
    worker = start(valkey.url, TINY_PROBE="1,5")
    assert works(redis_client, worker, "up")
    worker.process.send_signal(signal.SIGSTOP)
    assert not wait_for(worker.ended, 7)
    worker.process.send_signal(signal.SIGCONT)
    assert not wait_for(worker.ended, 4)
    assert works(redis_client, worker, "awake")
