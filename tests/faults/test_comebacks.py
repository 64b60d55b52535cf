"""Clients lose their stream and come back: they get exactly the rest, from any web process, and nobody else does."""

import json
import signal
import time
from collections.abc import Callable

import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import Web, pids, send
from waiting import LIMIT

RESUMABLE = {"X-LocalAI-Resumable": "1"}
BACKGROUND = {"X-LocalAI-Background": "1"}
GRACE = 20.0  # seconds that a job has without a reader
Ask = Callable[..., Caller]


def come_back(ledger: Ledger, seen: Caller, *, by: str = "GET", **more: str) -> Caller:
    """Ask for what comes behind the last event that was seen."""
    headers = {"Last-Event-ID": seen.last_id} if seen.last_id else {}
    if by == "POST":
        return ledger.follow("/v1/chat/completions", {"nothing": "of this is read"}, headers=headers, **more)
    return ledger.follow(f"/api/jobs/{seen.job}/stream", method="GET", headers=headers, **more)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("by", ["GET", "POST"])
def test_who_comes_back_gets_exactly_the_rest(ledger: Ledger, ask: Ask, by: str, how: str) -> None:
    stream = ask(numbers(60, delay_ms=30), headers=RESUMABLE).until_said(5)
    stream.cut(how)
    rest = come_back(ledger, stream, by=by)
    rest.whole()
    assert stream.text + rest.text == counted(60)
    assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}


def test_who_comes_back_many_times_misses_nothing_and_hears_nothing_twice(ledger: Ledger, ask: Ask) -> None:
    seen = [ask(numbers(80, delay_ms=30), headers=RESUMABLE).until_said(5)]
    while not seen[-1].complete:
        seen[-1].cut("RST")
        last = next(each for each in reversed(seen) if each.last_id)
        seen.append(come_back(ledger, last))
        until(lambda: seen[-1].said >= 5 or seen[-1].ended, LIMIT, "some words")
        assert len(seen) < 80
    assert "".join(each.text for each in seen) == counted(80)


def test_who_comes_back_after_the_end_gets_what_is_left(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(20, delay_ms=20), headers=BACKGROUND).until_said(5)
    stream.cut()
    assert ledger.row(stream.job)["state"] == "done"
    rest = come_back(ledger, stream)
    assert stream.text + rest.whole() == counted(20)
    again = come_back(ledger, rest)
    assert (again.whole(), again.events) == ("", [])  # only `[DONE]`
    everything = ledger.follow(f"/api/jobs/{stream.job}/stream", method="GET")
    assert everything.whole() == counted(20)


def test_who_comes_back_without_having_seen_anything_gets_it_all(ledger: Ledger, ask: Ask) -> None:
    ahead = ask(numbers(120, delay_ms=40), "echo-one").until_said(1)
    stream = ask(numbers(10, delay_ms=20), "echo-one", headers=RESUMABLE)
    until(lambda: stream.job, LIMIT, "the headers of a stream that waits")
    stream.cut()
    assert come_back(ledger, stream).whole() == counted(10)
    assert ahead.whole() == counted(120)


def test_a_stream_that_is_come_back_to_goes_on_over_the_death_of_its_owner(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stream = ask(numbers(120, delay_ms=40), headers=RESUMABLE).until_said(5)
    stream.cut()
    send(pids(cluster, "replica echo@"), signal.SIGKILL)
    rest = come_back(ledger, stream)
    rest.whole()
    assert stream.text + rest.text == counted(120)
    assert ledger.row(stream.job)["attempt"] == 2


def test_two_who_follow_the_same_stream_both_hear_all_of_it(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(40, delay_ms=30), headers=RESUMABLE).until_said(5)
    second = ledger.follow(f"/api/jobs/{stream.job}/stream", method="GET").until_said(8)
    third = ledger.follow(f"/api/jobs/{stream.job}/stream", method="GET").until_said(8)
    second.cut()
    assert stream.whole() == third.whole() == counted(40)


def test_another_key_cannot_come_back(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    key = cluster.cli("keys", "create", "stranger").strip()
    stream = ask(numbers(40, delay_ms=40), headers=RESUMABLE).until_said(3)
    for caller in (
        come_back(ledger, stream, key=key), come_back(ledger, stream, by="POST", key=key),
        ledger.follow(f"/api/jobs/{stream.job}/result", method="GET", key=key),
        ledger.follow(f"/api/jobs/{stream.job}", method="DELETE", key=key),
    ):  # fmt: skip
        assert (caller.wait().status, caller.error["code"]) == (404, "not_found")
    assert stream.whole() == counted(40)


def test_streams_outlive_the_web_process_that_was_killed(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    streams = [ask(numbers(120, delay_ms=40), headers=headers) for headers in (RESUMABLE, RESUMABLE, {}, BACKGROUND)]
    for stream in streams:
        stream.until_said(3)
    send(pids(cluster, "web"), signal.SIGKILL)
    for stream in streams:
        assert not stream.wait().complete

    def back() -> list[Caller]:
        found = [come_back(ledger, stream) for stream in streams]
        return found if all(each.wait().status == 200 for each in found) else []

    rests = until(back, LIMIT, "the rest of each")
    assert {stream.text + rest.text for stream, rest in zip(streams, rests, strict=True)} == {counted(120)}


def test_another_web_process_gives_the_rest(ledger: Ledger, ask: Ask, start_web: Callable[..., Web]) -> None:
    web = start_web()
    stream = ask(numbers(120, delay_ms=40), headers=RESUMABLE, address=web.address).until_said(5)
    send([web.process.pid], signal.SIGKILL)
    rest = come_back(ledger, stream.wait())
    rest.whole()
    assert stream.text + rest.text == counted(120)


def test_a_web_process_that_must_stop_ends_its_streams_in_time_and_all_can_be_come_back_to(
    ledger: Ledger, ask: Ask, start_web: Callable[..., Web]
) -> None:
    web = start_web()
    streams = [ask(numbers(60, delay_ms=30), address=web.address) for _ in range(20)]
    until(lambda: all(stream.job for stream in streams), LIMIT, "headers for those who speak and those who wait")
    web.process.terminate()
    for stream in streams:
        stream.wait()
    web.process.wait(LIMIT)
    rests = [None if stream.complete else come_back(ledger, stream) for stream in streams]
    assert any(rests)
    for stream, rest in zip(streams, rests, strict=True):
        assert stream.text + (rest.whole() if rest else "") == counted(60)


def test_a_call_in_one_piece_survives_its_web_process(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    ask(numbers(120, delay_ms=40), stream=False, headers=RESUMABLE)
    [job] = until(lambda: ledger.leased("echo"), LIMIT, "the claim")
    send(pids(cluster, "web"), signal.SIGKILL)
    until(
        lambda: ledger.follow(f"/api/jobs/{job}/result", method="GET").wait().text == counted(120), LIMIT, "the answer"
    )


def test_who_does_not_come_back_in_time_has_nothing_to_come_back_to(
    ledger: Ledger, ask: Ask, start_web: Callable[..., Web]
) -> None:
    web = start_web()
    left = ask(numbers(100, delay_ms=500), headers=RESUMABLE).until_said(2)
    bereft = ask(numbers(100, delay_ms=500), address=web.address).until_said(2)
    left.cut()
    send([web.process.pid], signal.SIGKILL)
    began = time.monotonic()
    assert ledger.row(left.job, 3 * GRACE)["state"] == "cancelled"
    assert time.monotonic() - began > GRACE - 1
    assert ledger.row(bereft.job, 3 * GRACE)["state"] == "cancelled"
    late = come_back(ledger, left).wait()
    assert "cancelled" in json.dumps(late.error), (late.status, late.body)


@pytest.mark.parametrize("said", ["header", "body"])
def test_a_request_in_the_background_is_promised_at_once_and_answered_later(
    ledger: Ledger, ask: Ask, said: str
) -> None:
    more = {"headers": BACKGROUND} if said == "header" else {"background": True}
    promise = ask(numbers(30, delay_ms=30), stream=False, **more).wait()
    assert promise.status == 202
    where = json.loads(promise.body)["result"]
    assert where == f"/api/jobs/{promise.job}/result" == promise.headers["location"]
    assert ledger.follow(where, method="GET").whole() == counted(30)
    assert ledger.follow(where, method="GET").whole() == counted(30)


def test_a_stream_in_the_background_goes_on_when_its_reader_leaves(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(40, delay_ms=30), headers=BACKGROUND).until_said(3)
    stream.cut()
    assert ledger.row(stream.job)["state"] == "done"
    assert ledger.follow(f"/api/jobs/{stream.job}/result", method="GET").whole() == counted(40)


def test_an_answer_that_is_kept_no_longer_is_gone(ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(10)).wait()
    ledger.row(stream.job)
    ledger.redis.delete(f"job:{stream.job}", f"gen:{stream.job}")  # as their time to live would
    for caller in (
        come_back(ledger, stream), come_back(ledger, stream, by="POST"),
        ledger.follow(f"/api/jobs/{stream.job}/stream", method="GET"),
        ledger.follow(f"/api/jobs/{stream.job}/result", method="GET"),
    ):  # fmt: skip
        assert (caller.wait().status, caller.error["code"]) == (410, "gone")
