"""The scripts on a real Valkey: a job has one owner at a time and one end, and is given back or taken away whole."""

import time

import pytest
import redis
from leased_jobs import (
    CANCELLED,
    DONE,
    LINE,
    bereave,
    claimed,
    everything,
    expire,
    journal,
    submission,
    submitted,
    write,
)
from waiting import listening

from localai_q import names
from localai_q.bus.journal import latest
from localai_q.bus.leases import CONTROL, Append, Lease, Leases, Refusal, Submission
from localai_q.cluster.events import End, encode
from localai_q.cluster.fleet import Demand


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

    @pytest.mark.parametrize(("field", "value"), [("attempt", "many"), ("keep", "what"), ("left", "soon")])
    def test_what_a_node_has_made_of_a_job_holds_up_nobody_who_looks_at_many(
        self, leases: Leases, redis_client: redis.Redis, field: str, value: str
    ) -> None:
        submitted(leases)
        leases.submit(submission("j2"), longest_line=10)
        redis_client.hset(names.job_key("j1"), field, value)
        assert leases.live(["j1", "j2"]).keys() == {"j2"}

    @pytest.mark.parametrize("value", ["x", b"\xff"])
    def test_what_a_node_has_made_of_its_keys_holds_up_no_other(
        self, leases: Leases, redis_client: redis.Redis, value: str | bytes
    ) -> None:
        submitted(leases)
        leases.submit(submission("j2"), longest_line=10)
        for key in (names.job_key("j1"), names.journal_key("j1"), names.ends_key("n1")):
            redis_client.set(key, value)
        redis_client.hset(names.ends_key("n2"), "j3", value)
        assert leases.live(["j1", "j2"]).keys() == {"j2"}
        assert latest(redis_client, ["j1", "j2"]) == {}
        assert leases.ends(["n1", "n2"]).keys() == {"n2"}

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
