"""Redis comes back without its data, or without a part of it: owners restore what they hold, control the rest."""

import shutil
from collections.abc import Callable
from signal import SIGSTOP

import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import away, pids, strike
from waiting import LIMIT

PAUSE = 3.0  # seconds: longer than a lease
Ask = Callable[..., Caller]


def test_what_runs_goes_on_when_redis_has_lost_everything(ledger: Ledger, ask: Ask) -> None:
    streams = [ask(numbers(80, delay_ms=40)) for _ in range(3)]
    whole = ask(numbers(80, delay_ms=40), stream=False)
    for stream in streams:
        stream.until_said(5)
    ledger.redis.flushall()
    assert {caller.whole() for caller in [*streams, whole]} == {counted(80)}
    for stream in streams:
        assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}
        assert ledger.journal(stream.job)


def test_what_runs_goes_on_when_redis_has_lost_everything_twice(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(100, delay_ms=40)).until_said(5)
    for words in (30, 60):
        ledger.redis.flushall()
        stream.until_said(words)
    assert stream.whole() == counted(100)


@pytest.mark.parametrize("stream", [True, False])
def test_what_waits_comes_back_when_redis_has_lost_everything(ledger: Ledger, ask: Ask, stream: bool) -> None:
    ahead = ask(numbers(80, delay_ms=40), "echo-one").until_said(1)
    waits = ask(numbers(10, delay_ms=20), "echo-one", stream=stream)
    until(lambda: ledger.waiting("echo-one"), LIMIT, "the job in its line")
    ledger.redis.flushall()
    assert ahead.whole() == counted(80)
    assert waits.whole() == counted(10)


def test_what_runs_goes_on_when_redis_is_started_without_its_files(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    before = pids(cluster, "replica")
    stream = ask(numbers(100, delay_ms=40)).until_said(5)
    whole = ask(numbers(100, delay_ms=40), stream=False)
    until(lambda: len(ledger.leased("echo")) == 2, LIMIT, "both at work")
    with away(cluster, "valkey"):
        shutil.rmtree(cluster.home / "valkey" / "appendonlydir")
    assert {stream.whole(), whole.whole()} == {counted(100)}
    assert ledger.journal(stream.job)
    assert pids(cluster, "replica") == before


def test_a_journal_that_vanished_is_written_anew(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(60, delay_ms=40)).until_said(10)
    ledger.redis.delete(f"gen:{stream.job}")
    assert stream.whole() == counted(60)
    text = "".join(event.get("t", "") for _, _, event in ledger.journal(stream.job) if event["k"] == "d")
    assert text == counted(60)


@pytest.mark.parametrize("pace", [0, 10], ids=["at once", "bit by bit"])
def test_a_job_whose_journal_is_full_fails_by_that_name_and_leaves_nothing_out(ledger: Ledger, pace: int) -> None:
    # Each choice has entries of its own, so many choices fill a journal faster than many tokens.
    prompts = [numbers(1, seed=number, first_ms=pace) for number in range(8)]
    caller = ledger.follow("/v1/completions", {"model": "echo", "prompt": prompts, "n": 16, "stream": True}).wait()
    assert "".join(str(number) * 16 for number in range(8)).startswith(caller.text)
    assert ledger.row(caller.job)["state"] == "failed"
    assert "LOCALAI_Q_JOURNAL_MAX" in caller.error["message"]


@pytest.mark.parametrize("what", ["valkey", "postgres", "control"])
def test_nobody_is_judged_dead_because_a_store_or_control_was_away(
    cluster: Cluster, ledger: Ledger, ask: Ask, what: str
) -> None:
    streams = [ask(numbers(90, delay_ms=50)) for _ in range(4)]
    for stream in streams:
        stream.until_said(3)
    strike(cluster, pids(cluster, what), SIGSTOP, PAUSE)
    assert {stream.whole() for stream in streams} == {counted(90)}
    assert [ledger.row(stream.job)["attempt"] for stream in streams] == [1] * 4


def test_requests_are_served_after_redis_lost_everything(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    before = pids(cluster, "replica")
    ledger.redis.flushall()
    until(lambda: ask("hello").wait().text == "hello", LIMIT, "an answer")
    assert pids(cluster, "replica") == before
