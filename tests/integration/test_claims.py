"""A process that holds jobs: its tokens are written soon, in order and once, and it hears when it must stop."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from waiting import LIMIT, wait_for

from localai_q import names, ports
from localai_q.bus.connection import client as client_of
from localai_q.bus.leases import Append, Lease, Leases, Refusal, Submission
from localai_q.cluster.events import Delta, End, Finish, decode
from localai_q.embedded.valkey import Valkey
from workers.claims import Claims, Held

LINE = names.model_queue("m1")
DONE = End(state="done")
CANCELLED = End(state="cancelled")
NEVER = 3600.0  # seconds


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

    def close(self) -> None:
        """Let go of everything, or the threads would give it back to the Valkey of the next test."""
        for held in self.claims.held():
            self.claims.drop(held)

    def lose_renewals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is learnt from them, so that it must have been learnt otherwise."""
        monkeypatch.setattr(self.leases, "renew", lambda leases: [Append.WRITTEN for _ in leases])

    def subscribers(self) -> set[str]:
        """The connections that hear of anything."""
        return {each["id"] for each in self.client.client_list(_type="pubsub")}

    def expiry(self, held: Held) -> float:
        """When the lease runs out."""
        return self.client.zscore(names.leases_key(LINE), held.lease.job_id)

    def entries(self, held: Held) -> list:
        """(index, event) of everything in the journal."""
        rows = self.client.xrange(names.journal_key(held.lease.job_id))
        return [(int(place.split("-")[1]), event) for place, fields in rows if (event := decode(fields["e"]))]

    def text(self, held: Held) -> str:
        entries = self.entries(held)
        assert [index for index, _ in entries] == list(range(1, len(entries) + 1))
        return "".join(event.text for _, event in entries if isinstance(event, Delta))


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench() -> Iterator[MakeBench]:
    made: list[Bench] = []

    def make(client: redis.Redis, **values: float) -> Bench:
        made.append(Bench(client, **values))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(redis_client: redis.Redis, make_bench: MakeBench) -> Bench:
    return make_bench(redis_client)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path, port=ports.choose(), password="own")
    server.start()
    server.wait_ready()
    yield server
    server.stop(2.0)


def test_the_first_token_of_a_job_is_written_before_the_next_flush(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.claims.FLUSH", NEVER)
    jobs = [bench.hold() for _ in range(20)]
    for held in jobs:
        held.emit(Delta(text="first"))
        assert wait_for(lambda held=held: bench.text(held) == "first")
    assert all(held.finish(DONE) for held in jobs)


def test_later_tokens_wait_for_the_next_flush_and_are_written_together_in_their_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bench.hold()
    monkeypatch.setattr("workers.claims.FLUSH", NEVER)
    held.emit(Delta(text="0 ", tokens=1))
    assert wait_for(lambda: held.written)
    words = [f"{n} " for n in range(1, 400)]
    for word in words:
        held.emit(Delta(text=word, tokens=1))
    assert not wait_for(lambda: bench.text(held) != "0 ", 0.5)
    assert held.finish(DONE)
    together = Delta(text="".join(words), tokens=399)
    assert [event for _, event in bench.entries(held)] == [Delta(text="0 ", tokens=1), together, DONE]


def test_a_flush_writes_what_has_come_since_the_last(bench: Bench) -> None:
    held = bench.hold()
    for n in range(1, 9):
        held.emit(Delta(text=f"{n} "))
        assert wait_for(lambda n=n: bench.text(held).endswith(f"{n} "))
    assert len(bench.entries(held)) == 8


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
        thread.join(LIMIT)
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
    broker: Valkey, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.claims.RETRY", 0.05)
    client = client_of(broker.url)
    client.config_set("appendfsync", "always")
    bench = make_bench(client)
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
    assert producing.wait(LIMIT)
    assert wait_for(lambda: client.xlen(key) > 2)
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.process.wait(LIMIT)
    broker.start()
    broker.wait_ready()
    thread.join(LIMIT)
    assert held.finish(DONE)
    assert bench.text(held) == "".join(f"{n} " for n in range(500))
    assert not held.cancelled.is_set()


def test_an_end_is_written_when_redis_is_back(
    broker: Valkey, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.claims.RETRY", 0.05)
    client = client_of(broker.url)
    client.config_set("appendfsync", "always")
    bench = make_bench(client)
    held = bench.hold()
    held.emit(Delta(text="kept"))
    assert wait_for(lambda: client.xlen(names.journal_key(held.lease.job_id)) == 2)
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.process.wait(LIMIT)
    held.emit(Delta(text=" and pending"))
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(held.finish(DONE)))
    thread.start()
    time.sleep(0.2)
    assert done == []
    broker.start()
    broker.wait_ready()
    thread.join(LIMIT)
    assert done == [True]
    assert bench.text(held) == "kept and pending"


def test_a_cancellation_is_announced_to_the_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.lose_renewals(monkeypatch)
    held = bench.hold()
    called = threading.Event()
    held.on_cancel(called.set)
    assert bench.leases.abort(held.lease.job_id, LINE, CANCELLED) == "asked"
    assert called.wait(LIMIT)
    assert held.why == "cancelled"
    assert held.finish(CANCELLED)


def test_who_cancels_says_how_it_ends_and_a_pause_can_become_a_cancellation_but_not_the_other_way(bench: Bench) -> None:
    held = bench.hold()
    assert held.asked().error["error"] == "Cancelled", "nobody has said anything"
    paused = End(state="cancelled", error={"error": "Paused", "message": "p"})
    words = End(state="failed", error={"error": "Unavailable", "message": "its node has not begun it"})
    for end, pause, told in (
        (paused, True, paused),
        (words, False, words),
        (paused, True, words),
        (CANCELLED, False, words),
    ):
        assert bench.leases.abort(held.lease.job_id, LINE, end, pause=pause) == "asked"
        assert held.asked() == told
    assert wait_for(held.cancelled.is_set)
    held.finish(words)


def test_a_cancelled_job_whose_owner_died_ends_with_the_words_of_who_cancelled_it(bench: Bench) -> None:
    held = bench.hold()
    words = End(state="failed", error={"error": "Unavailable", "message": "w"})
    bench.leases.abort(held.lease.job_id, LINE, words)
    assert wait_for(held.cancelled.is_set)
    held.release()
    assert bench.claims.claim(held.lease.job_id, LINE) == Refusal(job_id=held.lease.job_id, why="cancelled")
    assert bench.entries(held)[-1][1] == words


def test_a_cancellation_whose_announcement_was_lost_is_heard_with_the_next_token(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.lose_renewals(monkeypatch)
    held = bench.hold()
    bench.client.hset(names.job_key(held.lease.job_id), "cancel", "1")
    held.emit(Delta(text="x"))
    assert wait_for(held.cancelled.is_set)
    assert held.why == "cancelled"


def test_a_cancellation_whose_announcement_was_lost_is_heard_with_the_next_renewal(
    redis_client: redis.Redis, make_bench: MakeBench
) -> None:
    bench = make_bench(redis_client, lease=0.6)
    held = bench.hold()
    bench.client.hset(names.job_key(held.lease.job_id), "cancel", "1")
    assert wait_for(held.cancelled.is_set)
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


def test_a_channel_of_cancellations_is_listened_to_again_after_a_cut(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.lose_renewals(monkeypatch)
    held = bench.hold()
    channel = names.cancel_channel(bench.node_id)
    before = bench.subscribers()
    bench.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert wait_for(lambda: not bench.subscribers() & before and bench.client.pubsub_numsub(channel)[0][1] == 1)
    bench.leases.abort(held.lease.job_id, LINE, CANCELLED)
    assert wait_for(held.cancelled.is_set)


def test_leases_are_kept_while_the_work_is_silent(redis_client: redis.Redis, make_bench: MakeBench) -> None:
    bench = make_bench(redis_client, lease=1.5)
    held = bench.hold()
    for _ in range(3):
        before = bench.expiry(held)
        assert wait_for(lambda before=before: bench.expiry(held) > before)
    assert not held.cancelled.is_set()
    held.finish(DONE)


def test_work_whose_lease_was_taken_stops_as_lost_and_writes_nothing_more(
    redis_client: redis.Redis, make_bench: MakeBench
) -> None:
    bench = make_bench(redis_client, lease=0.6)
    held = bench.hold()
    job_id = held.lease.job_id
    redis_client.zadd(names.leases_key(LINE), {job_id: 1})
    assert bench.leases.requeue_expired(LINE) == {job_id: 1}
    other = bench.leases.claim(job_id, LINE, owner="r2", node_id="n2")
    assert isinstance(other, Lease)
    assert wait_for(held.cancelled.is_set)
    assert held.why == "lost"
    held.emit(Delta(text="ghost"))
    assert not held.finish(DONE)
    assert bench.leases.append([(other, 1, [Delta(text="mine")])]) == [Append.WRITTEN]
    assert bench.text(held) == "mine"


def test_a_journal_that_is_full_stops_the_work_for_that_reason(bench: Bench) -> None:
    held = bench.hold()
    bench.leases._journal_max = 0
    held.emit(Delta(text="x"))
    assert wait_for(held.cancelled.is_set)
    assert held.why == "journal"
    assert held.finish(End(state="failed"))


def test_what_comes_behind_a_hole_is_not_written_and_an_answer_with_a_hole_is_not_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bench.hold()
    held.emit(Delta(text="whole"))
    assert wait_for(lambda: bench.text(held) == "whole")
    monkeypatch.setattr(bench.leases, "_journal_max", 2)
    with bench.claims._io:
        held.emit(Delta(text="too"))
        held.emit(Finish(choice=0))
    assert wait_for(held.cancelled.is_set)
    assert held.why == "journal"
    monkeypatch.undo()  # there would be room again
    held.emit(Delta(text="ghost"))
    assert held.finish(DONE)
    assert bench.text(held) == "whole"
    end = bench.entries(held)[-1][1]
    assert (end.state, end.error["error"]) == ("failed", "GenerationFailed")
    assert "journal is full" in end.error["message"]


@pytest.mark.parametrize(("said", "becomes"), [(DONE, "failed"), (CANCELLED, "cancelled")])
def test_an_answer_whose_last_words_do_not_fit_is_not_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, said: End, becomes: str
) -> None:
    held = bench.hold()
    held.emit(Delta(text="whole"))
    assert wait_for(lambda: bench.text(held) == "whole")
    monkeypatch.setattr(bench.leases, "_journal_max", 1)
    with monkeypatch.context() as patched:
        patched.setattr(bench.claims, "held", list)  # nothing is written before the end is
        held.emit(Delta(text=" and more"))
        assert not held.cancelled.is_set()
        assert held.finish(said)
    assert held.why == "journal"
    assert bench.text(held) == "whole"
    end = bench.entries(held)[-1][1]
    assert end.state == becomes
    assert (end.error or {}).get("error") == (None if becomes == "cancelled" else "GenerationFailed")
    assert bench.leases.ends([bench.node_id])[bench.node_id].keys() == {held.lease.job_id}


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
    assert bench.leases.requeue_expired(LINE) == {job_id: 1}
    assert bench.claims.claim(job_id, LINE) == Refusal(job_id=job_id, why="cancelled")
    assert bench.leases.live([job_id])[job_id].state == "ended"
    assert bench.leases.waiting(LINE) == []


def test_all_work_stops_when_the_process_must(bench: Bench) -> None:
    jobs = [bench.hold() for _ in range(3)]
    bench.claims.cancel_all("drain")
    assert [held.why for held in jobs] == ["drain"] * 3


class TestLosses:
    """Redis loses what it had; the owner gives it back and goes on."""

    def begun(self, bench: Bench, text: str = "first ") -> Held:
        """A job of which an earlier owner wrote "earlier ", and this one has written `text`."""
        job_id = bench.submit(stream=True, watcher="w1")
        earlier = bench.leases.claim(job_id, LINE, owner="dead", node_id="dead")
        assert isinstance(earlier, Lease)
        bench.leases.append([(earlier, 1, [Delta(text="earlier ", tokens=1)])])
        bench.leases.release(earlier, died=True)
        held = bench.claims.claim(job_id, LINE)
        assert isinstance(held, Held)
        if text:
            held.emit(Delta(text=text))
            assert wait_for(lambda: bench.text(held).endswith(text))
        return held

    def ids(self, held: Held, client: redis.Redis) -> list[str]:
        return [place for place, _ in client.xrange(names.journal_key(held.lease.job_id))]

    def test_what_earlier_owners_emitted_is_known_from_the_claim(self, bench: Bench) -> None:
        assert self.begun(bench).emitted() == [Delta(text="earlier ", tokens=1)]
        assert bench.hold().emitted() == []

    def test_with_the_next_token_all_is_as_it_was(self, bench: Bench) -> None:
        held = self.begun(bench)
        before = bench.client.hgetall(names.job_key(held.lease.job_id))
        bench.client.flushall()
        held.emit(Delta(text="second "))
        assert wait_for(lambda: bench.text(held) == "earlier first second ")
        assert self.ids(held, bench.client) == ["1-0", "1-1", "2-1", "2-2", "2-3"]
        assert bench.client.hgetall(names.job_key(held.lease.job_id)) == before
        held.emit(Delta(text="third"))
        assert held.finish(DONE)
        assert bench.text(held) == "earlier first second third"
        assert bench.leases.ends([bench.node_id]).keys() == {bench.node_id}
        assert not held.cancelled.is_set()

    def test_a_silent_job_is_restored_by_its_renewal(self, redis_client: redis.Redis, make_bench: MakeBench) -> None:
        bench = make_bench(redis_client, lease=1.5)
        held = self.begun(bench)
        redis_client.flushall()
        assert wait_for(lambda: bench.text(held) == "earlier first ")
        assert bench.leases.live([held.lease.job_id])[held.lease.job_id].state == "leased"
        restored = bench.expiry(held)
        assert wait_for(lambda: bench.expiry(held) > restored), "it is kept from then on"
        assert held.finish(DONE)

    def test_an_end_that_was_reached_when_redis_lost_all_is_not_lost(self, bench: Bench) -> None:
        held = self.begun(bench)
        with bench.claims._io:
            bench.client.flushall()
            held.emit(Delta(text="last"))
        assert held.finish(DONE)
        assert bench.text(held) == "earlier first last"
        assert bench.entries(held)[-1][1] == DONE
        assert bench.leases.live([held.lease.job_id])[held.lease.job_id].state == "ended"
        assert bench.claims.held() == []

    def test_a_job_that_is_given_back_when_redis_lost_all_goes_on_elsewhere(self, bench: Bench) -> None:
        held = self.begun(bench)
        bench.client.flushall()
        held.release()
        assert bench.leases.waiting(LINE) == [held.lease.job_id]
        again = bench.claims.claim(held.lease.job_id, LINE)
        assert isinstance(again, Held)
        assert "".join(event.text for event in again.emitted()) == "earlier first "
        assert again.lease.attempt == 3

    def test_what_is_pending_when_a_job_is_given_back_is_written_first(self, bench: Bench) -> None:
        held = self.begun(bench, "")
        with bench.claims._io:
            held.emit(Delta(text="pending"))
        held.release()
        assert bench.text(held) == "earlier pending"

    def test_a_journal_that_is_deleted_in_the_middle_is_written_anew(self, bench: Bench) -> None:
        held = self.begun(bench)
        for n in range(200):
            held.emit(Delta(text=f"{n} "))
            if n % 50 == 25:
                bench.client.delete(names.journal_key(held.lease.job_id))
            time.sleep(0.001)
        assert held.finish(DONE)
        assert bench.text(held) == "earlier first " + "".join(f"{n} " for n in range(200))
        assert not held.cancelled.is_set()

    def test_a_journal_that_lost_its_last_entries_is_made_whole(self, bench: Bench) -> None:
        held = self.begun(bench)
        bench.client.xdel(names.journal_key(held.lease.job_id), "2-2")
        held.emit(Delta(text="second"))
        assert wait_for(lambda: bench.text(held) == "earlier first second")

    def test_losses_while_many_jobs_write_lose_and_double_nothing(self, bench: Bench) -> None:
        jobs = [self.begun(bench) for _ in range(4)]
        expected = "earlier first " + "".join(f"{n} " for n in range(300))

        lost = threading.Event()

        def produce(held: Held) -> None:
            for n in range(300):
                held.emit(Delta(text=f"{n} "))
                time.sleep(0.002)
            assert lost.wait(LIMIT)  # what has ended nobody restores
            held.finish(DONE)

        threads = [threading.Thread(target=produce, args=(held,)) for held in jobs]
        for thread in threads:
            thread.start()
        for _ in range(5):
            time.sleep(0.1)
            bench.client.flushall()
        lost.set()
        for thread in threads:
            thread.join(LIMIT)
        assert [bench.text(held) for held in jobs] == [expected] * 4
        assert all(bench.entries(held)[-1][1] == DONE for held in jobs)

    def test_an_answer_that_is_lost_before_redis_loses_all_loses_nothing(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("workers.claims.RETRY", 0.05)
        held = self.begun(bench)
        real, cut = bench.leases.append, threading.Event()

        def losing(batches):
            answers = real(batches)
            if not cut.is_set():
                cut.set()
                bench.client.flushall()
                raise redis.ConnectionError("the answer was lost")
            return answers

        monkeypatch.setattr(bench.leases, "append", losing)
        held.emit(Delta(text="second "))
        assert cut.wait(LIMIT)
        held.emit(Delta(text="third"))
        assert held.finish(DONE)
        assert bench.text(held) == "earlier first second third"

    def test_a_redis_that_comes_back_empty_gets_everything(
        self, broker: Valkey, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("workers.claims.RETRY", 0.05)
        bench = make_bench(client_of(broker.url))
        held = self.begun(bench)
        os.kill(broker.process.pid, signal.SIGKILL)
        broker.process.wait(LIMIT)
        held.emit(Delta(text="second "))
        shutil.rmtree(broker.data)
        broker.start()
        broker.wait_ready()
        held.emit(Delta(text="third"))
        assert held.finish(DONE)
        assert bench.text(held) == "earlier first second third"

    def test_an_owner_whose_job_control_brought_back_stops(self, bench: Bench) -> None:
        held = self.begun(bench)
        job_id = held.lease.job_id
        with bench.claims._io:
            bench.client.flushall()
            bench.leases.submit(Submission(job_id=job_id, line=LINE, request={}, attempt=1000), longest_line=9)
        held.emit(Delta(text="ghost"))
        assert wait_for(held.cancelled.is_set)
        assert held.why == "lost"
        assert not held.finish(DONE)
        assert bench.leases.waiting(LINE) == [job_id]
        assert self.ids(held, bench.client) == []

    def test_an_owner_whose_job_was_forgotten_stops(self, redis_client: redis.Redis, make_bench: MakeBench) -> None:
        bench = make_bench(redis_client, lease=0.6)
        spoke, silent = self.begun(bench), self.begun(bench)
        for held in (spoke, silent):
            redis_client.delete(names.job_key(held.lease.job_id), names.journal_key(held.lease.job_id))
        spoke.emit(Delta(text="ghost"))
        for held in (spoke, silent):
            assert wait_for(held.cancelled.is_set)
            assert held.why == "lost"
            assert not held.finish(DONE)
            assert not redis_client.exists(names.job_key(held.lease.job_id), names.journal_key(held.lease.job_id))

    def test_two_processes_of_one_owner_are_told_apart(self, bench: Bench, make_bench: MakeBench) -> None:
        """After a fail-over has lost the claim of the first, its attempt is given out again."""
        held = bench.hold()
        job_id = held.lease.job_id
        with bench.claims._io:
            bench.client.hset(names.job_key(job_id), mapping={"attempt": 0, "state": "waiting"})
            bench.client.delete(names.journal_key(job_id), names.leases_key(LINE))
            again = make_bench(bench.client).claims.claim(job_id, LINE)
        assert isinstance(again, Held)
        assert again.lease.attempt == held.lease.attempt
        held.emit(Delta(text="ghost"))
        assert wait_for(held.cancelled.is_set)
        assert held.why == "lost"
        again.emit(Delta(text="mine"))
        assert again.finish(DONE)
        assert bench.text(again) == "mine"

    def test_a_dead_owner_is_known_by_the_name_that_its_processes_share(self, bench: Bench) -> None:
        held = bench.hold()
        assert bench.leases.requeue_of("r", LINE) == {}
        assert bench.leases.requeue_of("r1", LINE) == {held.lease.job_id: 1}
