"""What owners write on a real Valkey: a journal without gap or repetition, to which only the owner adds."""

import pytest
import redis
from leased_jobs import (
    CANCELLED,
    DONE,
    JOURNAL_MAX,
    LINE,
    bereave,
    claimed,
    journal,
    pieces,
    submitted,
    write,
)
from waiting import listening

from localai_q import names
from localai_q.bus.leases import Append, Lease, Leases
from localai_q.cluster.events import encode


class TestAppend:
    def test_an_owner_whose_job_was_taken_writes_nothing(self, leases: Leases, redis_client: redis.Redis) -> None:
        first = claimed(leases, submitted(leases))
        bereave(leases, redis_client)
        claimed(leases, "j1", "r2")
        before = journal(redis_client, "j1")
        assert write(leases, first, 1, "ghost") is Append.FENCED
        assert journal(redis_client, "j1") == before

    def test_nobody_writes_to_a_job_that_has_ended_waits_or_is_unknown(self, leases: Leases) -> None:
        lease = claimed(leases, submitted(leases))
        leases.release(lease)
        assert write(leases, lease, 1, "x") is Append.FENCED
        again = claimed(leases, "j1")
        leases.finish(again, 1, DONE, node_id="n1")
        assert write(leases, again, 2, "x") is Append.FENCED

    def test_a_job_that_redis_does_not_know_is_lost_to_its_owner(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.delete(names.job_key("j1"))
        before = journal(redis_client, "j1")
        assert write(leases, lease, 1, "x") is Append.LOST
        assert leases.renew([lease]) == [Append.LOST]
        assert leases.release(lease) is Append.LOST
        assert leases.finish(lease, 1, DONE, node_id="n1") is Append.LOST
        assert journal(redis_client, "j1") == before
        assert leases.ends(["n1", "n2", "n3"]) == {}

    def test_a_journal_that_is_gone_is_not_begun_anew(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.delete(names.journal_key("j1"))
        assert write(leases, lease, 1, "x") is Append.LOST
        assert leases.finish(lease, 1, DONE, node_id="n1") is Append.LOST
        assert not redis_client.exists(names.journal_key("j1"))
        assert leases.live(["j1"])["j1"].state == "leased"

    @pytest.mark.parametrize("written", [0, 3])
    def test_nothing_is_written_behind_a_gap(self, leases: Leases, redis_client: redis.Redis, written: int) -> None:
        lease = claimed(leases, submitted(leases))
        write(leases, lease, 1, *"abc"[:written])
        before = journal(redis_client, "j1")
        assert write(leases, lease, written + 2, "x") is Append.LOST
        assert leases.finish(lease, written + 2, DONE, node_id="n1") is Append.LOST
        assert journal(redis_client, "j1") == before
        assert write(leases, lease, written + 1, "x") is Append.WRITTEN

    def test_the_first_entry_of_a_later_attempt_must_not_leave_a_gap_either(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        first = claimed(leases, submitted(leases))
        write(leases, first, 1, "a", "b")
        leases.release(first)
        second = claimed(leases, "j1", "r2")
        assert write(leases, second, 4, "x") is Append.LOST
        assert write(leases, second, 3, "c") is Append.WRITTEN

    def test_another_owner_of_the_same_attempt_is_refused_everything(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        """A fail-over can lose a claim, whose number is then given out a second time."""
        first = claimed(leases, submitted(leases), "r1.a")
        redis_client.hset(names.job_key("j1"), mapping={"attempt": 0, "state": "waiting"})
        redis_client.delete(names.leases_key(LINE), names.journal_key("j1"))
        second = claimed(leases, "j1", "r1.b")
        assert (first.attempt, second.attempt) == (1, 1)
        write(leases, second, 1, "mine")
        before = journal(redis_client, "j1")
        assert write(leases, first, 1, "ghost") is Append.FENCED
        assert write(leases, first, 2, "ghost") is Append.FENCED
        assert leases.renew([first]) == [Append.FENCED]
        assert leases.finish(first, 2, DONE, node_id="n1") is Append.FENCED
        assert leases.release(first) is Append.FENCED
        assert leases.restore(first, []) is None
        assert journal(redis_client, "j1") == before
        assert leases.finish(second, 2, DONE, node_id="n2") is Append.WRITTEN

    def test_a_journal_has_a_most_and_takes_exactly_that(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        assert write(leases, lease, 1, *["x"] * (JOURNAL_MAX - 1)) is Append.WRITTEN
        assert write(leases, lease, JOURNAL_MAX, "y", "z") is Append.JOURNAL_FULL
        assert write(leases, lease, JOURNAL_MAX, "y") is Append.WRITTEN
        assert write(leases, lease, JOURNAL_MAX + 1, "z") is Append.JOURNAL_FULL
        assert len(journal(redis_client, "j1")) == JOURNAL_MAX + 1
        assert leases.finish(lease, JOURNAL_MAX + 1, DONE, node_id="n1")  # there is always room for the end

    def test_what_is_tried_again_word_for_word_is_there_and_announced_once(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        submitted(leases, watcher="w1")
        lease = claimed(leases, "j1")
        with listening(redis_client, "web:w1") as heard:
            assert write(leases, lease, 1, "a", "b") is Append.WRITTEN
            assert write(leases, lease, 1, "a", "b") is Append.WRITTEN  # the answer to the first was lost
            assert write(leases, lease, 1, "a", "b", "c") is Append.WRITTEN  # and more has come since
            said = [words for _, words in heard()]
        assert said == [f"j1 1-{n} {encode(piece)}" for n, piece in enumerate(pieces("a", "b", "c"), 1)]
        assert [text for _, text in journal(redis_client, "j1")] == [None, "a", "b", "c"]

    def test_writes_of_several_jobs_in_one_trip_keep_their_order_and_their_answers(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        one, two = (claimed(leases, submitted(leases, job)) for job in ("j1", "j2"))
        leases.abort("j2", LINE, CANCELLED)
        ghost = Lease(job_id="j1", line=LINE, attempt=1, last_index=0, request={}, stream=False, owner="ghost")
        batches = [(one, 1, pieces("a", "b")), (two, 1, pieces("x")), (ghost, 1, pieces("!")), (one, 3, pieces("c"))]
        assert leases.append(batches) == [Append.WRITTEN, Append.CANCEL, Append.FENCED, Append.WRITTEN]
        assert [text for _, text in journal(redis_client, "j1")] == [None, "a", "b", "c"]
        assert [text for _, text in journal(redis_client, "j2")] == [None, "x"]

    def test_every_watcher_hears_each_entry(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases, watcher="w1 w2")
        lease = claimed(leases, "j1")
        assert leases.live(["j1"])["j1"].watchers == ("w1", "w2")
        with listening(redis_client, "web:w1", "web:w2") as heard:
            write(leases, lease, 1, "a")
            assert sorted(channel for channel, _ in heard()) == ["web:w1", "web:w2"]
