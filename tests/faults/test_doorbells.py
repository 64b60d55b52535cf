"""Doorbells ring thrice, in another order, never, or are garbage: each job is done once."""

import json
from collections.abc import Callable

from callers import Caller, counted, numbers
from celery import Celery
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import pids, stopped
from waiting import LIMIT

from localai_q import names

Ask = Callable[..., Caller]

GARBAGE: list[object] = [
    b"\x00\xff\xfe", b"", b"null", b"[]", b"{}", b'{"body": 5}', b"a" * 300_000, b'{"headers": {}, "properties": {}}',
    json.dumps({"body": "W10=", "headers": {"task": 7}, "properties": {"delivery_info": {}}}).encode(),
]  # fmt: skip


def ring(cluster: Cluster, job_id: str, line: str, times: int = 1, task: str = names.RUN_GENERATION) -> None:
    app = Celery(broker=cluster.state()["redis_url"])
    for _ in range(times):
        app.send_task(task, args=[job_id], queue=line, ignore_result=True)
    app.close()


def test_a_doorbell_that_is_delivered_many_times_at_once_makes_one_claim(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    line, redis = ledger.line("echo"), cluster.redis()
    with stopped(pids(cluster, "replica echo@")):
        stream = ask(numbers(20, delay_ms=30))
        [job] = until(lambda: ledger.waiting("echo"), LIMIT, "the job in its line")
        ring(cluster, job, line, 6)
        until(lambda: redis.llen(line) >= 5, LIMIT, "doorbells that lie there")
    assert stream.whole() == counted(20)
    assert ledger.row(job) == {"state": "done", "attempt": 1, "error": None}
    assert sum(event["k"] == "m" for _, _, event in ledger.journal(job)) == 1


def test_doorbells_in_another_order_serve_everybody(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    line, redis = ledger.line("echo-one"), cluster.redis()
    first = ask(numbers(20, delay_ms=40), "echo-one").until_said(1)
    later = [ask(numbers(5 + place, delay_ms=20), "echo-one") for place in range(3)]
    until(lambda: len(ledger.waiting("echo-one")) == 3 and redis.llen(line) >= 2, LIMIT, "three that wait")
    with redis.pipeline() as pipe:
        rung = redis.lrange(line, 0, -1)
        pipe.delete(line).rpush(line, *reversed(rung)).execute()
    assert first.whole() == counted(20)
    assert [caller.whole() for caller in later] == [counted(5), counted(6), counted(7)]


def test_doorbells_that_vanish_are_rung_again(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    line, redis = ledger.line("echo-one"), cluster.redis()
    first = ask(numbers(10, delay_ms=40), "echo-one").until_said(1)
    later = [ask(numbers(5), "echo-one", stream=stream) for stream in (True, False)]
    until(lambda: len(ledger.waiting("echo-one")) == 2, LIMIT, "two that wait")
    while not (first.ended and redis.llen(line) == 0):
        redis.delete(line)
    assert [first.whole(), *(caller.whole() for caller in later)] == [counted(10), counted(5), counted(5)]


def test_a_doorbell_for_nobody_wakes_nobody(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    ended = ask("hello").wait().job
    for job in ("aaaaaaaaaaaaaaaa", ended, "../../etc", ""):
        ring(cluster, job, ledger.line("echo"))
    before = ledger.journal(ended)
    assert ask("still here").whole() == "still here"
    until(lambda: not cluster.redis().llen(ledger.line("echo")), LIMIT, "an empty queue")
    assert ledger.journal(ended) == before


def test_garbage_on_the_queue_is_put_aside_and_the_next_request_served(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    line, redis, before = ledger.line("echo"), cluster.redis(), pids(cluster, "replica echo@")
    speaks = ask(numbers(40, delay_ms=40)).until_said(1)
    redis.lpush(line, *GARBAGE)
    ring(cluster, "aaaaaaaaaaaaaaaa", line, task="os.system")
    next_one = ask("next")
    assert next_one.whole() == "next"
    assert next_one.took < 2
    assert speaks.whole() == counted(40)
    until(lambda: redis.llen(f"dead:{line}") >= len(GARBAGE), LIMIT, "what was put aside")
    redis.delete(f"dead:{line}")
    assert pids(cluster, "replica echo@") == before
