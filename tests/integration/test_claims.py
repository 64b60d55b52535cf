"""A process that holds jobs: its tokens are written soon, in order and once, and it hears when it must stop."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from waiting import wait_for

from localai_q import names, ports
from localai_q.bus.connection import client as client_of
from localai_q.bus.leases import Append, Lease, Leases, Refusal, Submission
from localai_q.cluster.events import Delta, End, Finish, decode
from localai_q.embedded.valkey import Valkey
from workers.claims import FLUSH, Claims, Held

LINE = names.model_queue("m1")
DONE = End(state="done")
CANCELLED = End(state="cancelled")


class Bench:
    """Claims on a Valkey, with what they need."""

    def __init__(self, client: redis.Redis, lease: float = 30.0) -> None:
        self.client = client
        self.leases = Leases(client, lease=lease, journal_ttl=60.0, journal_max=100_000)
        self.node_id = names.new_id()
        self.claims = Claims(client, self.leases, owner="r1", node_id=self.node_id, lease=lease)
        channel = names.cancel_channel(self.node_id)
        assert wait_for(lambda: client.pubsub_numsub(channel)[0][1] == 1)

    def submit(self, **values: object) -> str:
        job_id = names.new_id()
        self.leases.submit(Submission(job_id=job_id, line=LINE, request={}, **values), longest_line=100)
        return job_id

    def hold(self) -> Held:
        held = self.claims.claim(self.submit(), LINE)
        assert isinstance(held, Held)
        return held

    def entries(self, held: Held) -> list:
        """(index, event) of everything in the journal."""
        rows = self.client.xrange(names.journal_key(held.lease.job_id))
        return [(int(place.split("-")[1]), event) for place, fields in rows if (event := decode(fields["e"]))]

    def text(self, held: Held) -> str:
        entries = self.entries(held)
        assert [index for index, _ in entries] == list(range(1, len(entries) + 1))
        return "".join(event.text for _, event in entries if isinstance(event, Delta))


@pytest.fixture
def bench(redis_client: redis.Redis) -> Bench:
    return Bench(redis_client)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path, port=ports.choose(), password="own")
    server.start()
    server.wait_ready()
    yield server
    server.stop(2.0)


def test_the_first_token_is_written_at_once(bench: Bench) -> None:
    took = []
    for _ in range(20):
        held = bench.hold()
        key = names.journal_key(held.lease.job_id)
        started = time.perf_counter()
        held.emit(Delta(text="first"))
        while bench.client.xlen(key) < 2:
            assert time.perf_counter() - started < 1.0
        took.append(time.perf_counter() - started)
        held.finish(DONE)
    assert statistics.median(took) < 0.005


def test_later_tokens_are_written_together_in_their_order(bench: Bench) -> None:
    held = bench.hold()
    words = [f"{n} " for n in range(400)]
    started = time.monotonic()
    for word in words:
        held.emit(Delta(text=word, tokens=1))
        time.sleep(0.0005)
    took = time.monotonic() - started
    assert held.finish(DONE)
    assert bench.text(held) == "".join(words)
    events = [event for _, event in bench.entries(held)]
    assert sum(event.tokens for event in events if isinstance(event, Delta)) == 400
    assert events[0].text == "0 "  # the first was not held back
    assert len(events) <= took / FLUSH + 5  # one entry per flush, the end, and some room


def test_what_is_not_joined_keeps_its_place(bench: Bench) -> None:
    held = bench.hold()
    events = [Delta(text="a"), Delta(text="b", choice=1), Delta(text="c"), Finish(choice=0), Delta(text="d", choice=1)]
    with bench.claims._io:  # nothing is written meanwhile
        for event in events:
            held.emit(event)
    held.finish(DONE)
    assert [event for _, event in bench.entries(held)] == [*events, DONE]


def test_an_end_takes_what_is_pending_with_it(bench: Bench) -> None:
    held = bench.hold()
    for word in ("x", "y", "z"):
        held.emit(Delta(text=word))
    assert held.finish(DONE)
    assert bench.text(held) == "xyz"
    assert bench.entries(held)[-1][1] == DONE
    assert bench.claims.held() == []


def test_tokens_of_many_jobs_at_once_reach_their_own_journals(bench: Bench) -> None:
    jobs = [bench.hold() for _ in range(8)]

    def produce(held: Held, name: int) -> None:
        for n in range(100):
            held.emit(Delta(text=f"{name}:{n} "))
            time.sleep(0.0005)
        held.finish(DONE)

    threads = [threading.Thread(target=produce, args=(held, name)) for name, held in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for name, held in enumerate(jobs):
        assert bench.text(held) == "".join(f"{name}:{n} " for n in range(100))


def test_an_answer_that_is_lost_loses_and_doubles_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.claims.RETRY", 0.05)
    real, cuts = bench.leases.append, iter([True, False, True, True] + [False] * 1000)

    def losing(batches):
        answers = real(batches)
        if next(cuts):
            raise redis.ConnectionError("the answer was lost")
        return answers

    monkeypatch.setattr(bench.leases, "append", losing)
    held = bench.hold()
    for n in range(60):
        held.emit(Delta(text=f"{n} "))
        time.sleep(0.005)
    assert held.finish(DONE)
    assert bench.text(held) == "".join(f"{n} " for n in range(60))


def test_a_restart_of_redis_in_the_middle_loses_and_doubles_nothing(
    broker: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.claims.RETRY", 0.05)
    client = client_of(broker.url)
    client.config_set("appendfsync", "always")
    bench = Bench(client)
    held = bench.hold()
    key = names.journal_key(held.lease.job_id)
    producing = threading.Event()

    def produce() -> None:
        for n in range(500):
            held.emit(Delta(text=f"{n} "))
            time.sleep(0.002)
            if n == 100:
                producing.set()

    thread = threading.Thread(target=produce)
    thread.start()
    assert producing.wait(5)
    assert client.xlen(key) > 2
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.process.wait(5)
    broker.start()
    broker.wait_ready()
    thread.join(20)
    assert held.finish(DONE)
    assert bench.text(held) == "".join(f"{n} " for n in range(500))
    assert not held.cancelled.is_set()


def test_an_end_is_written_when_redis_is_back(broker: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.claims.RETRY", 0.05)
    client = client_of(broker.url)
    client.config_set("appendfsync", "always")
    bench = Bench(client)
    held = bench.hold()
    held.emit(Delta(text="kept"))
    assert wait_for(lambda: client.xlen(names.journal_key(held.lease.job_id)) == 2)
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.process.wait(5)
    held.emit(Delta(text=" and pending"))
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(held.finish(DONE)))
    thread.start()
    time.sleep(0.2)
    assert done == []
    broker.start()
    broker.wait_ready()
    thread.join(20)
    assert done == [True]
    assert bench.text(held) == "kept and pending"


def test_a_cancellation_reaches_the_work_at_once(bench: Bench) -> None:
    held = bench.hold()
    called = threading.Event()
    held.on_cancel(called.set)
    started = time.monotonic()
    assert bench.leases.abort(held.lease.job_id, LINE, CANCELLED) == "asked"
    assert called.wait(2)
    assert time.monotonic() - started < 0.2
    assert held.why == "cancelled"
    assert held.finish(CANCELLED)


def test_a_cancellation_whose_announcement_was_lost_is_heard_with_the_next_token(bench: Bench) -> None:
    held = bench.hold()
    bench.client.hset(names.job_key(held.lease.job_id), "cancel", "1")
    held.emit(Delta(text="x"))
    assert held.cancelled.wait(2)
    assert held.why == "cancelled"


def test_a_cancellation_whose_announcement_was_lost_is_heard_with_the_next_renewal(redis_client: redis.Redis) -> None:
    bench = Bench(redis_client, lease=0.6)
    held = bench.hold()
    bench.client.hset(names.job_key(held.lease.job_id), "cancel", "1")
    assert held.cancelled.wait(2)
    assert held.why == "cancelled"


def test_work_that_is_cancelled_before_it_can_hear_is_told_when_it_listens(bench: Bench) -> None:
    held = bench.hold()
    held.cancel("cancelled")
    called = threading.Event()
    held.on_cancel(called.set)
    assert called.is_set()


def test_the_first_reason_to_stop_is_the_one_that_counts(bench: Bench) -> None:
    held = bench.hold()
    calls: list[int] = []
    held.on_cancel(lambda: calls.append(1))
    held.cancel("cancelled")
    held.cancel("lost")
    assert (held.why, calls) == ("cancelled", [1])


def test_a_cancelled_channel_is_listened_to_again_after_a_cut(bench: Bench) -> None:
    held = bench.hold()
    channel = names.cancel_channel(bench.node_id)
    bench.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert wait_for(lambda: bench.client.pubsub_numsub(channel)[0][1] == 1, 5)
    bench.leases.abort(held.lease.job_id, LINE, CANCELLED)
    assert held.cancelled.wait(2)


def test_leases_are_kept_while_the_work_is_silent(redis_client: redis.Redis) -> None:
    bench = Bench(redis_client, lease=0.6)
    held = bench.hold()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert bench.leases.requeue_expired(LINE) == []
        time.sleep(0.02)
    assert not held.cancelled.is_set()
    held.finish(DONE)


def test_work_whose_lease_was_taken_stops_as_lost_and_writes_nothing_more(redis_client: redis.Redis) -> None:
    bench = Bench(redis_client, lease=0.6)
    held = bench.hold()
    job_id = held.lease.job_id
    redis_client.zadd(names.leases_key(LINE), {job_id: 1})
    other = bench.leases.claim(job_id, LINE, owner="r2", node_id="n2")
    assert isinstance(other, Lease)
    assert held.cancelled.wait(2)
    assert held.why == "lost"
    held.emit(Delta(text="ghost"))
    assert not held.finish(DONE)
    assert bench.leases.append([(other, 1, [Delta(text="mine")])]) == [Append.WRITTEN]
    assert bench.text(held) == "mine"


@pytest.mark.parametrize("what", ["gone", "full"])
def test_a_journal_that_cannot_be_written_stops_the_work_for_that_reason(bench: Bench, what: str) -> None:
    held = bench.hold()
    if what == "gone":
        bench.client.delete(names.journal_key(held.lease.job_id))
    else:
        bench.leases._journal_max = 0
    held.emit(Delta(text="x"))
    assert held.cancelled.wait(2)
    assert held.why == "journal"
    assert held.finish(End(state="failed"))


def test_a_job_that_is_given_back_can_be_had_again(bench: Bench) -> None:
    held = bench.hold()
    held.release(died=True)
    assert bench.claims.held() == []
    again = bench.claims.claim(held.lease.job_id, LINE)
    assert isinstance(again, Held)
    assert again.lease.deaths == 1


def test_what_is_not_to_be_had_is_not_held(bench: Bench) -> None:
    assert bench.claims.claim("unknown", LINE) == Refusal(job_id="unknown", why="unknown")
    assert bench.claims.held() == []


def test_a_job_whose_owner_died_after_it_was_asked_to_cancel_is_ended_by_the_next(
    bench: Bench, redis_client: redis.Redis
) -> None:
    job_id = bench.submit()
    assert isinstance(bench.leases.claim(job_id, LINE, owner="dead", node_id="dead"), Lease)
    assert bench.leases.abort(job_id, LINE, CANCELLED) == "asked"
    redis_client.zadd(names.leases_key(LINE), {job_id: 1})
    assert bench.leases.requeue_expired(LINE) == [job_id]
    assert bench.claims.claim(job_id, LINE) == Refusal(job_id=job_id, why="cancelled")
    assert bench.leases.live([job_id])[job_id].state == "ended"
    assert bench.leases.waiting(LINE) == []


def test_all_work_stops_when_the_process_must(bench: Bench) -> None:
    jobs = [bench.hold() for _ in range(3)]
    bench.claims.cancel_all("drain")
    assert [held.why for held in jobs] == ["drain"] * 3
