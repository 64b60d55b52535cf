"""What owners bring back of a job that Redis has lost: all of it, once, and nothing that has ended."""

import pytest
import redis
from leased_jobs import (
    CANCELLED,
    DONE,
    LINE,
    bereave,
    claimed,
    everything,
    journal,
    pieces,
    submitted,
    write,
)

from localai_q import names
from localai_q.bus.leases import Append, Lease, Leases


class TestRestore:
    """Redis was emptied, or has lost a part; the owner gives it back what it had, and goes on."""

    def begun(self, leases: Leases, **values: object) -> Lease:
        """A job of which a first owner wrote two entries, and which a second one has now."""
        first = claimed(leases, submitted(leases, request={"text": "ä€\u2028", "n": [1, None]}, **values), "r1")
        write(leases, first, 1, "a", "b")
        leases.release(first, died=True)
        return claimed(leases, "j1", "r2")

    def test_all_is_as_it_was_with_the_entries_of_earlier_attempts(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = self.begun(leases, stream=True, watcher="w1 w2", timeout=60.0)
        write(leases, lease, 3, "c", "d")
        before, expires = everything(redis_client), redis_client.pttl(names.job_key("j1"))
        redis_client.flushall()
        assert write(leases, lease, 5, "e") is Append.LOST
        restored = leases.restore(lease, pieces("c", "d"))
        assert restored is not None
        assert everything(redis_client) == before
        assert [place for place, _ in journal(redis_client, "j1")] == ["1-0", "1-1", "1-2", "2-2", "2-3", "2-4"]
        assert 0 < redis_client.pttl(names.journal_key("j1")) <= 60_000 + 24 * 3600 * 1000
        assert 60_000 < redis_client.pttl(names.job_key("j1")) <= expires + 120_000
        assert write(leases, restored, 5, "e") is Append.WRITTEN
        assert leases.renew([restored]) == [Append.WRITTEN]
        leases.release(restored)
        again = claimed(leases, "j1", "r3")
        assert (again.attempt, again.last_index, again.deaths) == (3, 5, 1)
        assert (again.request, again.fields["deadline"]) == (lease.request, lease.fields["deadline"])
        assert 0 < again.left <= lease.left

    def test_a_job_without_a_deadline_is_forgotten_only_after_its_end(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.flushall()
        restored = leases.restore(lease, [])
        assert redis_client.pttl(names.job_key("j1")) == -1
        leases.finish(restored, 1, DONE, node_id="n1")
        assert 0 < redis_client.pttl(names.job_key("j1")) <= 60_000

    def test_fields_that_only_others_know_come_back_too(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases)
        redis_client.hset(names.job_key("j1"), mapping={"something": "else", "left": "1"})
        lease = claimed(leases, "j1")
        redis_client.flushall()
        leases.restore(lease, [])
        assert redis_client.hget(names.job_key("j1"), "something") == "else"
        assert not redis_client.hexists(names.job_key("j1"), "left"), "somebody may have come back for it since"

    def test_a_journal_that_lost_its_last_entries_is_whole_again(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = self.begun(leases)
        write(leases, lease, 3, "c", "d")
        before = everything(redis_client)
        for lost in (["2-4"], ["2-3", "2-4"], ["1-2", "2-2", "2-3", "2-4"]):
            redis_client.xdel(names.journal_key("j1"), *lost)
            assert write(leases, lease, 5, "e") is Append.LOST
            lease = leases.restore(lease, pieces("c", "d"))
            assert everything(redis_client) == before
        redis_client.delete(names.journal_key("j1"))
        assert leases.finish(lease, 5, DONE, node_id="n1") is Append.LOST
        assert leases.restore(lease, pieces("c", "d")) == lease
        assert everything(redis_client) == before
        assert leases.finish(lease, 5, DONE, node_id="n1") is Append.WRITTEN

    def test_what_was_asked_of_the_job_since_its_claim_stays(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        leases.abort("j1", LINE, CANCELLED)
        redis_client.delete(names.journal_key("j1"))
        assert leases.restore(lease, []) is not None
        assert leases.renew([lease]) == [Append.CANCEL]

    def test_a_job_that_was_merely_forgotten_stays_so(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.delete(names.job_key("j1"), names.journal_key("j1"))
        assert leases.restore(lease, pieces("a")) is None
        assert not redis_client.exists(names.job_key("j1"), names.journal_key("j1"))

    def test_an_owner_that_restored_its_job_cannot_do_so_again_once_that_has_ended(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.flushall()
        restored = leases.restore(lease, [])
        assert restored.epoch != lease.epoch
        leases.abort("j1", LINE, CANCELLED, force=True)
        assert leases.restore(restored, []) is None
        redis_client.delete(names.job_key("j1"), names.journal_key("j1"))  # as it is in the end
        assert leases.restore(restored, []) is None
        assert not redis_client.exists(names.job_key("j1"))

    def test_two_owners_that_restore_agree_on_the_epoch(self, leases: Leases, redis_client: redis.Redis) -> None:
        one, two = (claimed(leases, submitted(leases, job)) for job in ("j1", "j2"))
        assert one.epoch == two.epoch
        redis_client.flushall()
        assert leases.restore(one, []).epoch == leases.restore(two, []).epoch == redis_client.get(names.EPOCH)
        assert claimed(leases, submitted(leases, "j3")).epoch == redis_client.get(names.EPOCH)

    @pytest.mark.parametrize("state", ["waiting", "leased", "ended"])
    def test_a_job_that_control_brought_back_is_not_taken_from_it(
        self, leases: Leases, redis_client: redis.Redis, state: str
    ) -> None:
        lease = claimed(leases, submitted(leases))
        redis_client.flushall()
        submitted(leases, attempt=1000)
        if state != "waiting":
            other = claimed(leases, "j1", "r2")
            write(leases, other, 1, "new")
            if state == "ended":
                leases.finish(other, 2, DONE, node_id="n2")
        before = everything(redis_client)
        assert leases.restore(lease, pieces("old")) is None
        assert everything(redis_client) == before
        assert write(leases, lease, 2, "old") is Append.FENCED
        assert everything(redis_client) == before

    def test_of_two_that_held_the_job_the_later_one_gets_it_whoever_comes_first(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        first = claimed(leases, submitted(leases), "r1")
        write(leases, first, 1, "a")
        bereave(leases, redis_client)
        second = claimed(leases, "j1", "r2")
        write(leases, second, 2, "b")
        before = everything(redis_client)
        redis_client.flushall()
        assert leases.restore(first, pieces("a")) is not None
        assert write(leases, second, 3, "c") is Append.LOST
        assert leases.renew([second]) == [Append.LOST]
        assert leases.restore(second, pieces("b")) is not None
        assert everything(redis_client) == before
        assert write(leases, first, 2, "ghost") is Append.FENCED
        assert leases.restore(first, pieces("a")) is None

    def test_a_claim_that_redis_lost_is_made_good_before_the_next_one(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        """As after a power cut, which takes the last second of writes."""
        submitted(leases)
        hash_before = redis_client.hgetall(names.job_key("j1"))
        lease = claimed(leases, "j1")
        write(leases, lease, 1, "a")
        before = everything(redis_client)
        redis_client.delete(names.job_key("j1"), names.journal_key("j1"), names.leases_key(LINE))
        redis_client.hset(names.job_key("j1"), mapping=hash_before)
        redis_client.zadd(names.waiting_key(LINE), {"j1": 1})
        assert leases.finish(lease, 2, DONE, node_id="n1") is Append.LOST
        assert leases.restore(lease, pieces("a")) is not None
        assert everything(redis_client) == before
        assert leases.waiting(LINE) == []

    def test_a_journal_of_many_entries_comes_back(self, redis_client: redis.Redis) -> None:
        leases = Leases(redis_client, lease=30.0, journal_ttl=60.0, journal_max=30_000)
        lease = claimed(leases, submitted(leases))
        events = pieces(*map(str, range(20_000)))
        redis_client.flushall()
        assert leases.restore(lease, events) is not None
        assert redis_client.xlen(names.journal_key("j1")) == 20_001
        assert write(leases, lease, 20_001, "next") is Append.WRITTEN
