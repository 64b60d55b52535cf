"""Valkey, Postgres or both are away: what streams goes on, what is new is refused, and nothing has to be restarted."""

import time
from collections.abc import Callable
from signal import SIGKILL

from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import away, pids, running, send
from waiting import LIMIT

Ask = Callable[..., Caller]


def refused(ask: Ask) -> None:
    """A new request gets 503 and is told when to come back, as a stream and in one piece."""
    for stream in (True, False):
        caller = ask("now?", stream=stream).wait()
        assert (caller.status, caller.error["code"]) == (503, "unavailable"), (caller.status, caller.body)
        assert int(caller.headers["retry-after"]) > 0


def serves(ask: Ask) -> bool:
    return ask("again").wait().text == "again"


def test_replicas_live_through_a_restart_of_valkey_and_serve_on(cluster: Cluster, ask: Ask) -> None:
    before = pids(cluster, "replica")
    killed = pids(cluster, "valkey")
    send(killed, SIGKILL)
    until(lambda: running(cluster, "valkey") not in ([], killed), LIMIT, "another Valkey")
    until(lambda: serves(ask), LIMIT, "an answer")
    assert pids(cluster, "replica") == before


def test_while_valkey_is_away_new_requests_are_refused_and_streams_catch_up_later(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    before = pids(cluster, "replica")
    stream = ask(numbers(100, delay_ms=40)).until_said(2)
    with away(cluster, "valkey"):
        refused(ask)
    assert stream.whole() == counted(100)
    assert ledger.row(stream.job)["state"] == "done"
    until(lambda: serves(ask), LIMIT, "an answer")
    assert pids(cluster, "replica") == before


def test_while_postgres_is_away_tokens_flow_and_new_requests_are_refused(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    streams = [ask(numbers(60, delay_ms=40)), ask(numbers(60, delay_ms=40), stream=False)]
    streams[0].until_said(2)
    with away(cluster, "postgres"):
        refused(ask)
        assert streams[0].whole() == counted(60)
        assert streams[1].whole() == counted(60)
        assert cluster.redis().keys("ends:*")
    for stream in streams:
        assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}
    until(lambda: serves(ask), LIMIT, "an answer")


def test_a_running_job_can_be_cancelled_by_its_client_while_postgres_is_away(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stream = ask(numbers(200, delay_ms=40), "echo-one").until_said(2)
    with away(cluster, "postgres"):
        stream.cut()
        until(lambda: not ledger.redis.keys("leases:*"), LIMIT, "a free slot")
    assert ledger.row(stream.job)["state"] == "cancelled"


def test_a_valkey_without_memory_refuses_new_requests_and_streams_catch_up_later(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stream = ask(numbers(80, delay_ms=40)).until_said(2)
    whole = ask(numbers(60, delay_ms=40), stream=False)
    until(lambda: len(ledger.leased("echo")) == 2, LIMIT, "both at work")
    redis = cluster.redis()
    redis.config_set("maxmemory", 1)
    try:
        refused(ask)
        time.sleep(1.0)  # tokens come meanwhile, and cannot be written
    finally:
        redis.config_set("maxmemory", 0)
    assert stream.whole() == counted(80)
    assert whole.whole() == counted(60)
    until(lambda: serves(ask), LIMIT, "an answer")
