"""The scripts on a real Valkey: a job has one owner at a time, one end, and a journal without gap or repetition."""

import time

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from waiting import listening

from localai_q import names
from localai_q.bus.leases import CONTROL, Append, Lease, Leases, Refusal, Submission
from localai_q.cluster.events import Delta, End, Usage, decode, encode
from localai_q.cluster.fleet import Demand

LINE = names.model_queue("m1")
JOURNAL_MAX = 50
DONE = End(state="done", usage=Usage(prompt=3, completion=2))
CANCELLED = End(state="cancelled", error={"error": "Cancelled", "message": "no", "param": None})


@pytest.fixture
def leases(redis_client: redis.Redis) -> Leases:
    return Leases(redis_client, lease=30.0, journal_ttl=60.0, journal_max=JOURNAL_MAX)


def submission(job_id: str, **values: object) -> Submission:
    return Submission(**{"job_id": job_id, "line": LINE, "request": {"ask": job_id}, **values})


def submitted(leases: Leases, job_id: str = "j1", **values: object) -> str:
    leases.submit(submission(job_id, **values), longest_line=100)
    return job_id


def claimed(leases: Leases, job_id: str, owner: str = "r1", node_id: str = "n1") -> Lease:
    lease = leases.claim(job_id, LINE, owner=owner, node_id=node_id)
    assert isinstance(lease, Lease), lease
    return lease


def expire(client: redis.Redis, job_id: str) -> None:
    """Let the job's lease run out now."""
    assert client.zadd(names.leases_key(LINE), {job_id: 1}, xx=True, ch=True)


def bereave(leases: Leases, client: redis.Redis, job_id: str = "j1") -> None:
    """Let the job's lease run out now, and control put it back into its line."""
    expire(client, job_id)
    assert job_id in leases.requeue_expired(LINE)


def pieces(*texts: str) -> list[Delta]:
    return [Delta(text=text, tokens=1) for text in texts]


def write(leases: Leases, lease: Lease, index: int, *texts: str) -> Append:
    return leases.append([(lease, index, pieces(*texts))])[0]


def journal(client: redis.Redis, job_id: str) -> list[tuple[str, str]]:
    """Every entry: its id, and its text or kind."""
    rows = client.xrange(names.journal_key(job_id))
    return [(place, getattr(decode(fields["e"]), "text", decode(fields["e"]))) for place, fields in rows]


class TestSubmit:
    def test_a_job_is_told_its_place_in_the_line(self, leases: Leases) -> None:
        assert [leases.submit(submission(f"j{n}"), longest_line=10) for n in (1, 2, 3)] == [1, 2, 3]
        assert leases.waiting(LINE) == ["j1", "j2", "j3"]
        assert leases.submit(submission("other", line=names.model_queue("m2")), longest_line=10) == 1

    def test_a_full_line_refuses_and_leaves_no_trace(self, leases: Leases, redis_client: redis.Redis) -> None:
        from localai_q.errors import Busy

        leases.submit(submission("j1"), longest_line=1)
        with pytest.raises(Busy, match="1 requests wait"):
            leases.submit(submission("j2"), longest_line=1)
        assert leases.live(["j1", "j2"]).keys() == {"j1"}
        assert leases.waiting(LINE) == ["j1"]

    def test_a_job_that_runs_makes_room_in_its_line(self, leases: Leases) -> None:
        claimed(leases, submitted(leases))
        assert leases.submit(submission("j2"), longest_line=1) == 1

    def test_a_job_that_is_known_is_left_as_it_is(self, leases: Leases) -> None:
        claimed(leases, submitted(leases))
        assert leases.submit(submission("j1"), longest_line=1) == 0
        assert leases.live(["j1"])["j1"].state == "leased"
        assert leases.waiting(LINE) == []

    def test_a_job_is_forgotten_in_the_end(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases, lives=100)
        assert 60_000 < redis_client.pttl(names.job_key("j1")) <= 100_000

    def test_how_long_a_job_has_waited_is_known(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases)
        assert leases.waiting(LINE, older_than=5.0) == []
        redis_client.zincrby(names.waiting_key(LINE), -6000, "j1")
        assert leases.waiting(LINE, older_than=5.0) == ["j1"]


class TestClaim:
    def test_the_owner_gets_the_request_and_a_higher_attempt(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases, stream=True, timeout=60.0, attempt=4, request={"text": "ä€", "n": [1, None]})
        lease = claimed(leases, "j1")
        assert (lease.attempt, lease.last_index, lease.deaths) == (5, 0, 0)
        assert (lease.request, lease.stream) == ({"text": "ä€", "n": [1, None]}, True)
        assert lease.left == pytest.approx(60.0, abs=1.0)
        live = leases.live(["j1"])["j1"]
        assert (live.state, live.attempt, live.node_id, live.line) == ("leased", 5, "n1", LINE)
        assert leases.waiting(LINE) == []

    def test_the_marker_of_an_attempt_stands_before_anything_that_it_writes(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        claimed(leases, submitted(leases))
        assert journal(redis_client, "j1") == [("1-0", None)]

    def test_a_job_that_somebody_has_is_refused(self, leases: Leases) -> None:
        claimed(leases, submitted(leases))
        assert leases.claim("j1", LINE, owner="r2", node_id="n2") == Refusal(job_id="j1", why="leased")
        assert leases.live(["j1"])["j1"].node_id == "n1"

    def test_whether_an_owner_whose_lease_ran_out_is_dead_is_not_for_the_next_to_judge(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        before = everything(redis_client)
        assert leases.claim("j1", LINE, owner="r2", node_id="n2") == Refusal(job_id="j1", why="leased")
        assert everything(redis_client) == before
        assert write(leases, lease, 1, "x") is Append.WRITTEN
        assert leases.requeue_expired(LINE) == {"j1": 1}
        assert claimed(leases, "j1", "r2").attempt == 2

    def test_a_job_whose_lease_redis_has_lost_can_be_had(self, leases: Leases, redis_client: redis.Redis) -> None:
        """Nobody would ever put it back: no lease of it runs out."""
        first = claimed(leases, submitted(leases))
        redis_client.delete(names.leases_key(LINE))
        assert claimed(leases, "j1", "r2").attempt == 2
        assert write(leases, first, 1, "x") is Append.FENCED

    def test_a_deadline_is_set_and_compared_by_the_clock_of_redis(
        self, leases: Leases, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds, _ = redis_client.time()
        monkeypatch.setattr(time, "time", lambda: 0.0)
        submitted(leases, timeout=60.0)
        deadline = int(redis_client.hget(names.job_key("j1"), "deadline")) / 1000
        assert deadline == pytest.approx(seconds + 60, abs=2)
        redis_client.hset(names.job_key("j1"), "deadline", int(deadline * 1000) - 50_000)
        assert claimed(leases, "j1").left == pytest.approx(10.0, abs=2)
        assert leases.kept("j1").left == pytest.approx(10.0, abs=2)

    def test_a_job_without_a_deadline_has_any_time(self, leases: Leases) -> None:
        assert claimed(leases, submitted(leases)).left is None

    def test_after_expiry_the_next_owner_goes_on_behind_what_was_written(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        first = claimed(leases, submitted(leases))
        assert write(leases, first, 1, "a", "b", "c") is Append.WRITTEN
        bereave(leases, redis_client)
        second = claimed(leases, "j1", "r2", "n2")
        assert (second.attempt, second.last_index) == (2, 3)
        assert write(leases, second, 4, "d") is Append.WRITTEN
        assert [place for place, _ in journal(redis_client, "j1")] == ["1-0", "1-1", "1-2", "1-3", "2-3", "2-4"]

    @pytest.mark.parametrize("why", ["unknown", "ended", "cancelled", "late"])
    def test_what_is_not_to_be_had_is_refused_with_the_reason(self, leases: Leases, why: str) -> None:
        if why == "late":
            submitted(leases, timeout=0.001)
            time.sleep(0.01)
        elif why != "unknown":
            lease = claimed(leases, submitted(leases))
            if why == "ended":
                leases.finish(lease, 1, DONE, node_id="n1")
            else:
                leases.abort("j1", LINE, CANCELLED)
        assert leases.claim("j1", LINE, owner="r2", node_id="n2") == Refusal(job_id="j1", why=why)


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


class TestRenew:
    def test_a_lease_that_ran_out_is_kept_as_long_as_nobody_took_it(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        assert leases.renew([lease]) == [1]
        assert leases.claim("j1", LINE, owner="r2", node_id="n2") == Refusal(job_id="j1", why="leased")
        assert write(leases, lease, 1, "x") is Append.WRITTEN

    def test_a_lease_that_was_taken_or_given_back_is_lost(self, leases: Leases, redis_client: redis.Redis) -> None:
        first = claimed(leases, submitted(leases))
        bereave(leases, redis_client)
        second = claimed(leases, "j1", "r2")
        assert leases.renew([first, second]) == [0, 1]
        leases.release(second)
        assert leases.renew([second]) == [0]
        assert redis_client.zcard(names.leases_key(LINE)) == 0

    def test_a_lease_that_was_put_back_into_its_line_is_lost(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        bereave(leases, redis_client)
        assert leases.renew([lease]) == [0]

    def test_a_renewal_sets_the_expiry_by_the_clock_of_redis(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        leases.renew([lease])
        seconds, micros = redis_client.time()
        left = redis_client.zscore(names.leases_key(LINE), "j1") - (seconds * 1000 + micros / 1000)
        assert 29_000 < left <= 30_001

    def test_nothing_to_renew_asks_nothing(self, leases: Leases) -> None:
        assert leases.renew([]) == []


def everything(client: redis.Redis, job_id: str = "j1") -> tuple:
    """What Redis has of a job: its hash, its journal, and whether somebody holds it."""
    held = client.zscore(names.leases_key(LINE), job_id) is not None
    return client.hgetall(names.job_key(job_id)), client.xrange(names.journal_key(job_id)), held


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


class TestFinish:
    def test_a_job_ends_once_and_leaves_its_end_for_control(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        write(leases, lease, 1, "a")
        with listening(redis_client, names.ENDS_CHANNEL) as heard:
            assert leases.finish(lease, 2, DONE, node_id="n1")
            assert heard() == [(names.ENDS_CHANNEL, "n1")]
        assert not leases.finish(lease, 2, DONE, node_id="n1")
        assert not leases.finish(lease, 3, CANCELLED, node_id="n1")
        assert journal(redis_client, "j1")[-1] == ("1-2", DONE)
        assert leases.ends(["n1", "n2", "n3"]) == {"n1": {"j1": f"1 {encode(DONE)}"}}
        assert redis_client.hget(names.job_key("j1"), "request") is None
        assert leases.live(["j1"])["j1"].state == "ended"
        assert not redis_client.exists(names.leases_key(LINE), names.waiting_key(LINE))
        assert 0 < redis_client.pttl(names.job_key("j1")) <= 60_000
        assert 0 < redis_client.pttl(names.journal_key("j1")) <= 60_000

    def test_an_owner_whose_job_was_taken_cannot_end_it(self, leases: Leases, redis_client: redis.Redis) -> None:
        first = claimed(leases, submitted(leases))
        bereave(leases, redis_client)
        second = claimed(leases, "j1", "r2", "n2")
        assert not leases.finish(first, 1, DONE, node_id="n1")
        assert leases.ends(["n1", "n2", "n3"]) == {}
        assert leases.finish(second, 1, DONE, node_id="n2")
        assert leases.ends(["n1", "n2", "n3"]).keys() == {"n2"}

    def test_ends_are_forgotten_one_by_one(self, leases: Leases) -> None:
        for job_id in ("j1", "j2"):
            leases.finish(claimed(leases, submitted(leases, job_id)), 1, DONE, node_id="n1")
        leases.forget_ends("n1", ["j1"])
        leases.forget_ends("n1", [])
        assert leases.ends(["n1", "n2", "n3"])["n1"].keys() == {"j2"}


class TestAbort:
    def test_a_job_that_waits_ends_at_once(self, leases: Leases, redis_client: redis.Redis) -> None:
        submitted(leases)
        assert leases.abort("j1", LINE, CANCELLED) == "ended"
        assert journal(redis_client, "j1") == [("1-1", CANCELLED)]
        assert leases.ends(["n1", "n2", "n3"]) == {CONTROL: {"j1": f"1 {encode(CANCELLED)}"}}
        assert leases.waiting(LINE) == []
        assert redis_client.hget(names.job_key("j1"), "request") is None
        assert leases.abort("j1", LINE, CANCELLED) is None
        assert leases.abort("unknown", LINE, CANCELLED) is None

    def test_the_owner_of_a_job_that_runs_is_asked_by_three_roads(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        lease = claimed(leases, submitted(leases))
        with listening(redis_client, names.cancel_channel("n1")) as heard:
            assert leases.abort("j1", LINE, CANCELLED) == "asked"
            assert heard() == [(names.cancel_channel("n1"), "j1")]
        assert write(leases, lease, 1, "x") is Append.CANCEL
        assert leases.renew([lease]) == [2]
        assert [text for _, text in journal(redis_client, "j1")] == [None, "x"]
        assert leases.finish(lease, 2, CANCELLED, node_id="n1")

    def test_force_ends_a_job_that_runs_and_fences_its_owner(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        write(leases, lease, 1, "a")
        with listening(redis_client, names.cancel_channel("n1")) as heard:
            assert leases.abort("j1", LINE, CANCELLED, force=True) == "ended"
            assert heard() == [(names.cancel_channel("n1"), "j1")]
        assert write(leases, lease, 2, "b") is Append.FENCED
        assert not leases.finish(lease, 2, DONE, node_id="n1")
        assert leases.renew([lease]) == [0]
        assert journal(redis_client, "j1")[-1] == ("2-2", CANCELLED)
        assert redis_client.zcard(names.leases_key(LINE)) == 0

    def test_a_job_whose_owner_is_silent_ends_at_once(self, leases: Leases, redis_client: redis.Redis) -> None:
        claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        assert leases.abort("j1", LINE, CANCELLED) == "ended"


class TestGivingBack:
    def test_a_job_that_is_given_back_waits_again(self, leases: Leases, redis_client: redis.Redis) -> None:
        lease = claimed(leases, submitted(leases))
        write(leases, lease, 1, "a")
        assert leases.release(lease)
        assert not leases.release(lease)
        assert leases.waiting(LINE) == ["j1"]
        assert redis_client.zcard(names.leases_key(LINE)) == 0
        again = claimed(leases, "j1", "r2")
        assert (again.attempt, again.last_index, again.deaths) == (2, 1, 0)
        assert again.request == {"ask": "j1"}

    def test_the_deaths_of_owners_are_counted(self, leases: Leases, redis_client: redis.Redis) -> None:
        leases.release(claimed(leases, submitted(leases)), died=True)
        assert claimed(leases, "j1").deaths == 1
        expire(redis_client, "j1")
        assert leases.requeue_expired(LINE) == {"j1": 2}
        assert leases.requeue_expired(LINE) == {}
        assert leases.waiting(LINE) == ["j1"]
        assert claimed(leases, "j1").deaths == 2

    def test_a_lease_that_lives_is_let_be(self, leases: Leases) -> None:
        claimed(leases, submitted(leases))
        assert leases.requeue_expired(LINE) == {}
        assert leases.waiting(LINE) == []

    def test_a_lease_that_is_renewed_between_the_look_and_the_deed_is_let_be(
        self, leases: Leases, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease = claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        look = redis_client.zrangebyscore

        def look_and_renew(*args, **options):
            found = look(*args, **options)
            leases.renew([lease])
            return found

        monkeypatch.setattr(leases._redis, "zrangebyscore", look_and_renew)
        assert leases.requeue_expired(LINE) == {}
        monkeypatch.undo()
        assert write(leases, lease, 1, "x") is Append.WRITTEN
        assert leases.waiting(LINE) == []

    def test_the_lease_of_a_job_that_redis_forgot_is_cleared(self, leases: Leases, redis_client: redis.Redis) -> None:
        claimed(leases, submitted(leases))
        expire(redis_client, "j1")
        redis_client.delete(names.job_key("j1"))
        assert leases.requeue_expired(LINE) == {}
        assert redis_client.zcard(names.leases_key(LINE)) == 0
        assert leases.waiting(LINE) == []


JOBS = ("a", "b")
OWNERS = ("r1", "r2", "r3")


class Machine(RuleBasedStateMachine):
    """Three owners, two jobs, leases that run out at any moment: what each owner believes against what is true."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.leases = Leases(self.client, lease=30.0, journal_ttl=60.0, journal_max=10_000)
        self.held: dict[tuple[str, str], tuple[Lease, int]] = {}  # by owner and job: the lease, the next index
        self.current: dict[str, str | None] = dict.fromkeys(JOBS)  # the owner whose attempt is the job's
        self.ended: dict[str, End] = {}
        self.written: dict[tuple[str, str], list[str]] = {}  # by owner and job: what its attempt has written
        self.texts: dict[str, list[str]] = {job: [] for job in JOBS}  # what was accepted, in order
        self.expired: set[str] = set()
        self.deaths = dict.fromkeys(JOBS, 0)

    @initialize()
    def submit(self) -> None:
        for job in JOBS:
            submitted(self.leases, job)

    @rule(job=st.sampled_from(JOBS), owner=st.sampled_from(OWNERS))
    def claim(self, job: str, owner: str) -> None:
        answer = self.leases.claim(job, LINE, owner=owner, node_id=owner)
        if job in self.ended:
            assert answer == Refusal(job_id=job, why="ended")
        elif self.current[job]:  # whether its lease has run out or not
            assert isinstance(answer, Refusal)
            assert answer.why in ("leased", "cancelled")
        elif isinstance(answer, Lease):
            assert (answer.last_index, answer.deaths) == (len(self.texts[job]), self.deaths[job])
            self.held[owner, job] = (answer, answer.last_index + 1)
            self.written[owner, job] = []
            self.current[job] = owner
        else:
            assert answer.why == "cancelled"

    @rule(job=st.sampled_from(JOBS), owner=st.sampled_from(OWNERS), count=st.integers(1, 3), again=st.booleans())
    def append(self, job: str, owner: str, count: int, again: bool) -> None:
        if (owner, job) not in self.held:
            return
        lease, index = self.held[owner, job]
        texts = [f"{lease.attempt}.{index + n}" for n in range(count)]
        for _ in range(1 + again):
            answer = write(self.leases, lease, index, *texts)
            assert (answer in (Append.WRITTEN, Append.CANCEL)) == self.owns(owner, job)
        if self.owns(owner, job):
            self.texts[job] += texts
            self.written[owner, job] += texts
            self.held[owner, job] = (lease, index + count)

    @rule(job=st.sampled_from(JOBS), owner=st.sampled_from(OWNERS))
    def renew(self, job: str, owner: str) -> None:
        if (owner, job) in self.held:
            kept = self.leases.renew([self.held[owner, job][0]]) != [0]
            assert kept == self.owns(owner, job)
            if kept:
                self.expired.discard(job)

    @rule(job=st.sampled_from(JOBS), everything=st.booleans())
    def lose(self, job: str, everything: bool) -> None:
        """Redis loses a job that somebody has, or its journal; its owner restores it, and nobody else can."""
        owner = self.current[job]
        if owner is None or job in self.expired:
            return
        self.client.delete(names.journal_key(job))
        if everything:
            self.client.delete(names.job_key(job), names.EPOCH)
        for other in sorted(OWNERS, key=owner.__eq__):
            if (other, job) in self.held:
                lease, index = self.held[other, job]
                restored = self.leases.restore(lease, pieces(*self.written[other, job]))
                if other == owner:
                    assert restored is not None
                    self.held[other, job] = (restored, index)

    @rule(job=st.sampled_from(JOBS), owner=st.sampled_from(OWNERS), died=st.booleans())
    def release(self, job: str, owner: str, died: bool) -> None:
        if (owner, job) in self.held:
            given = self.leases.release(self.held[owner, job][0], died=died)
            assert given == self.owns(owner, job)
            if given:
                self.current[job] = None
                self.expired.discard(job)
                self.deaths[job] += died

    @rule(job=st.sampled_from(JOBS), owner=st.sampled_from(OWNERS))
    def finish(self, job: str, owner: str) -> None:
        if (owner, job) in self.held:
            lease, index = self.held[owner, job]
            done = self.leases.finish(lease, index, DONE, node_id=owner)
            assert done == self.owns(owner, job)
            if done:
                self.end(job, DONE)

    @rule(job=st.sampled_from(JOBS), force=st.booleans())
    def abort(self, job: str, force: bool) -> None:
        alive = self.current[job] and job not in self.expired
        answer = self.leases.abort(job, LINE, CANCELLED, force=force)
        assert answer == (None if job in self.ended else "asked" if alive and not force else "ended")
        if answer == "ended":
            self.end(job, CANCELLED)

    @rule(job=st.sampled_from(JOBS))
    def time_passes(self, job: str) -> None:
        if self.client.zadd(names.leases_key(LINE), {job: 1}, xx=True, ch=True):
            self.expired.add(job)

    @rule()
    def requeue(self) -> None:
        taken = {job for job in JOBS if self.current[job] and job in self.expired and job not in self.ended}
        for job in taken:
            self.deaths[job] += 1
        assert self.leases.requeue_expired(LINE) == {job: self.deaths[job] for job in taken}
        for job in taken:
            self.current[job] = None
            self.expired.discard(job)

    def owns(self, owner: str, job: str) -> bool:
        return self.current[job] == owner and job not in self.ended

    def end(self, job: str, end: End) -> None:
        self.ended[job] = end
        self.current[job] = None
        self.expired.discard(job)

    @invariant()
    def journals_are_what_was_accepted(self) -> None:
        for job in JOBS:
            rows = journal(self.client, job)
            places = [tuple(map(int, place.split("-"))) for place, _ in rows]
            assert places == sorted(set(places))
            entries = [(place, text) for place, (_, text) in zip(places, rows, strict=True) if text is not None]
            assert [index for (_, index), _ in entries] == list(range(1, len(entries) + 1))
            ends = [text for _, text in entries if isinstance(text, End)]
            assert ends == ([self.ended[job]] if job in self.ended else [])
            assert [text for _, text in entries if not isinstance(text, End)] == self.texts[job]
            assert not ends or entries[-1][1] is ends[0]

    @invariant()
    def a_job_stands_in_one_place(self) -> None:
        waiting = set(self.leases.waiting(LINE))
        leased = set(self.client.zrange(names.leases_key(LINE), 0, -1))
        assert not waiting & leased
        assert (waiting | leased) == {job for job in JOBS if job not in self.ended and self.client.exists(f"job:{job}")}
        assert leased == {job for job in JOBS if self.current[job]}
        assert sorted(job for ends in self.leases.ends(OWNERS).values() for job in ends) == sorted(self.ended)


def test_whatever_owners_do_and_whenever_leases_run_out_a_journal_is_whole_and_a_job_ends_once(
    redis_client: redis.Redis,
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    made = type("MachineOnValkey", (Machine,), {"client": redis_client})
    quick = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(made, settings=quick)


def test_what_a_dead_owner_held_goes_back_at_once_and_what_others_hold_does_not(leases: Leases) -> None:
    for job_id, owner in (("a", "dead.1"), ("b", "deader.1")):
        leases.submit(Submission(job_id=job_id, line=LINE, request={}), longest_line=9)
        assert isinstance(leases.claim(job_id, LINE, owner=owner, node_id="n"), Lease)
    assert leases.requeue_of("dead", LINE) == {"a": 1}
    assert leases.requeue_of("dead", LINE) == {}
    assert leases.waiting(LINE) == ["a"]
    again = leases.claim("a", LINE, owner="next", node_id="n")
    assert isinstance(again, Lease)
    assert (again.attempt, again.deaths) == (2, 1)
    assert leases.live(["b"])["b"].state == "leased"


def test_a_job_that_redis_has_forgotten_does_not_stay_in_its_line(leases: Leases, redis_client: redis.Redis) -> None:
    line = names.model_queue("forgetful")
    for attempt in (
        lambda: leases.claim("lost", line, owner="r", node_id="n"),
        lambda: leases.abort("lost", line, End(state="cancelled")),
    ):
        redis_client.zadd(names.waiting_key(line), {"lost": 1})
        redis_client.zadd(names.leases_key(line), {"lost": 1})
        attempt()
        assert redis_client.exists(names.waiting_key(line), names.leases_key(line)) == 0


class TestWhoWaitsAndWorks:
    def test_a_line_tells_how_many_wait_how_many_too_long_and_the_longest(
        self, leases: Leases, redis_client: redis.Redis
    ) -> None:
        for number in range(3):
            submitted(leases, f"j{number}")
        redis_client.zincrby(names.waiting_key(LINE), -7000, "j2")
        other = names.model_queue("m2")
        found = leases.demand([LINE, other])
        assert (found[LINE].waiting, found[LINE].late) == (3, 1)
        assert 7.0 <= found[LINE].longest < 8.0
        assert found[other] == Demand()

    def test_each_owner_is_told_with_how_many_jobs_it_works_on(self, leases: Leases) -> None:
        for job_id, owner in (("j1", "r1.x"), ("j2", "r1.y"), ("j3", "r2.x"), ("j4", "")):
            submitted(leases, job_id)
            if owner:
                claimed(leases, job_id, owner)
        assert leases.owners([LINE, names.model_queue("m2")]) == {"r1": 2, "r2": 1}
        assert leases.owners([]) == {}
        assert leases.demand([]) == {}
