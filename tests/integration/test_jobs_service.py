"""Jobs end once, can be cancelled in any state, and are found again whatever was lost."""

import time
from dataclasses import replace

import pytest
import redis
from cluster_data import add_model, claim, expire, join, ready_node, rung, watched
from sqlalchemy import text
from waiting import wait_for

from localai_q import names
from localai_q.bus import presence
from localai_q.bus.journal import Listener
from localai_q.bus.leases import Refusal
from localai_q.cluster.events import Delta, End, Progress, Usage, encode
from localai_q.cluster.jobs import DEATHS, GRACE, Job, Keep
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.errors import Busy, GenerationFailed, Gone, ModelNotFound, NotFound, Unavailable, UnsupportedByModel
from localai_q.services import generations, jobs
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs as rows
from localai_q.store.keys import ApiKey

ADMIN = ApiKey(id="admin", name="admin", role="admin", hint="", created=0.0)
DONE = End(state="done", usage=Usage(prompt=5, completion=7, cached=2), timings={"total": 1.5}, result={"x": 1})


def ask(services: Services, *, model: str = "m", stream: bool = False, kind: str = "chat") -> str:
    """A request is accepted; its job."""
    request = GenerationRequest(kind=kind, model=model, body={"messages": []}, stream=stream)
    accepted = generations.submit(
        services,
        Router(services, Snapshots(services)),
        request,
        key_id="k1",
        job_id=names.new_id(),
        watcher="w1",
        keep=Keep.NOT,
    )
    return accepted.job_id


def row(services: Services, job_id: str) -> Job:
    with services.db.transaction() as db:
        found = rows.by_id(db, job_id)
        request = db.execute(text("SELECT request FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one()
    assert found is not None
    return Job(**{**vars(found), "request": request})


def age(services: Services, job_id: str, seconds: float, *, deadline: float | None = None) -> None:
    """Make the job that much older, in Postgres and in its line."""
    with services.db.transaction() as db:
        db.execute(
            text("UPDATE jobs SET created_at = now() - make_interval(secs => :s) WHERE id = :id"),
            {"s": seconds, "id": job_id},
        )
        if deadline is not None:
            db.execute(
                text("UPDATE jobs SET deadline = to_timestamp(:at) WHERE id = :id"), {"at": deadline, "id": job_id}
            )
    line = row(services, job_id).line
    if services.redis.zscore(names.waiting_key(line), job_id):
        services.redis.zincrby(names.waiting_key(line), -1000 * seconds, job_id)


def rung_jobs(services: Services, line: str) -> list[str]:
    return [told.removeprefix("run_generation(").removesuffix(")") for told in rung(services, line)]


@pytest.fixture(autouse=True)
def owners(services: Services) -> None:
    """The nodes whose names the owners of these tests bear."""
    values = [{"id": node_id, "name": f"node of {node_id}"} for node_id in ("n1", "n2")]
    with services.db.transaction() as db:
        db.execute(text("INSERT INTO nodes (id, name, state, secret_hash) VALUES (:id, :name, 'offline', '')"), values)


@pytest.fixture
def line(services: Services) -> str:
    return names.model_queue(add_model(services))


class TestSubmission:
    def test_an_accepted_request_has_a_row_a_place_in_its_line_and_a_doorbell(
        self, services: Services, line: str
    ) -> None:
        before = time.time()
        job_id = ask(services, stream=True)
        job = row(services, job_id)
        assert (job.state, job.line, job.key_id, job.stream) == (JobState.OPEN, line, "k1", True)
        assert job.request["model"] == "m"
        assert before - 0.1 <= job.deadline - services.settings.request_timeout <= time.time() + 0.1
        assert services.leases.waiting(line) == [job_id]
        assert rung(services, line) == [f"run_generation({job_id})"]
        assert claim(services, job_id, line).request == job.request

    def test_a_request_that_finds_a_full_line_is_no_open_job(self, services: Services, line: str) -> None:
        for _ in range(services.settings.max_waiting):
            ask(services)
        with pytest.raises(Busy):
            ask(services)
        shown = jobs.listed(services, states=["failed"], kinds=[], limit=10)
        assert [job["error"]["error"] for job in shown] == ["Busy"]
        assert len(services.leases.waiting(line)) == services.settings.max_waiting

    def test_a_request_for_what_is_not_there_leaves_no_trace(self, services: Services, line: str) -> None:
        with pytest.raises(ModelNotFound, match="Models here: m"):
            ask(services, model="nothing")
        with pytest.raises(UnsupportedByModel):
            ask(services, kind="embedding")
        assert jobs.listed(services, states=[], kinds=[], limit=10) == []

    def test_a_request_that_was_refused_after_it_had_joined_its_line_does_not_run(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise redis.ConnectionError("gone")

        with monkeypatch.context() as patched:
            patched.setattr(services.redis, "publish", broken)
            with pytest.raises(Unavailable):
                ask(services)
        (job,) = jobs.listed(services, states=["failed"], kinds=[], limit=10)
        assert services.leases.waiting(line) == []
        assert services.leases.claim(job["id"], line, owner="r", node_id="n") == Refusal(job_id=job["id"], why="ended")

    def test_a_request_that_was_refused_while_redis_was_away_is_taken_out_of_its_line_when_it_is_back(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unavailable(*_: object, **__: object) -> None:
            raise Unavailable

        with monkeypatch.context() as patched:
            patched.setattr(services.doorbells, "ring", unavailable)
            patched.setattr(services.leases, "abort", unavailable)
            with pytest.raises(Unavailable):
                ask(services)
        (job_id,) = services.leases.waiting(line)
        age(services, job_id, 3)
        jobs.recover(services)
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.FAILED
        assert services.leases.waiting(line) == []

    def test_the_same_work_for_the_same_node_is_one_job_while_it_is_open(self, services: Services) -> None:
        node = ready_node(services)
        wanted = {"kind": "install_backend", "node_id": node.id, "model_id": None, "request": {"backend": "echo"}}
        first = jobs.submit_node_job(services, **wanted)
        assert jobs.submit_node_job(services, **wanted) == first
        other = jobs.submit_node_job(services, **{**wanted, "request": {"backend": "other"}})
        assert other != first
        queue = names.node_jobs_queue(node.id)
        assert rung(services, queue) == [f"run_job({first})", f"run_job({other})"]
        services.leases.finish(claim(services, first, queue, node.id), 1, DONE, node_id=node.id)
        jobs.apply_ends(services)
        assert jobs.submit_node_job(services, **wanted) not in (first, other)


class TestEnds:
    def test_an_end_is_written_once_with_everything_that_it_says(self, services: Services, line: str) -> None:
        node, before = ready_node(services), time.time()
        job_id = ask(services)
        services.leases.finish(claim(services, job_id, line, node.id), 1, DONE, node_id=node.id)
        assert jobs.apply_ends(services) == 1
        job = row(services, job_id)
        assert (job.state, job.attempt, job.node_id, job.request) == (JobState.DONE, 1, node.id, None)
        assert (job.usage, job.timings, job.result, job.error) == (DONE.usage, DONE.timings, DONE.result, None)
        assert before - 0.1 <= job.ended <= time.time() + 0.1
        assert services.leases.ends([node.id]) == {}
        assert jobs.apply_ends(services) == 0
        assert jobs.show(services, job_id, ADMIN)["node"] == "n1"

    def test_a_second_end_changes_nothing(self, services: Services, line: str) -> None:
        job_id = ask(services)
        services.leases.finish(claim(services, job_id, line), 1, DONE, node_id="n1")
        jobs.apply_ends(services)
        late = End(state="failed", error={"error": "GenerationFailed", "message": "late", "param": None})
        services.redis.hset(names.ends_key("n2"), job_id, f"2 {encode(late)}")
        assert jobs.apply_ends(services) == 0
        assert row(services, job_id).state is JobState.DONE
        assert services.leases.ends(["n2"]) == {}

    @pytest.mark.parametrize(
        "garbage",
        [
            "1 {no json",
            "words",
            '1 {"k":"m"}',
            '1 {"k":"e"}',
            "1 7",
            '1 {"k":"e","s":"nonsense","u":[1,2,3],"t":{},"x":null,"r":null}',
            '1 {"k":"e","s":"done","u":[1,2,"three"],"t":{},"x":null,"r":null}',
            '1 {"k":"e","s":"done","u":[1,2,3],"t":{},"x":null,"r":{"a":"\\u0000"}}',
        ],
    )
    def test_an_end_that_cannot_be_written_fails_its_job_and_holds_up_no_other(
        self, services: Services, line: str, garbage: str
    ) -> None:
        good, bad = ask(services), ask(services)
        services.leases.finish(claim(services, good, line), 1, DONE, node_id="n1")
        services.leases.finish(claim(services, bad, line), 1, DONE, node_id="n1")
        services.redis.hset(names.ends_key("n1"), mapping={bad: garbage, "unknown": garbage})
        assert jobs.apply_ends(services) == 2
        assert row(services, good).state is JobState.DONE
        assert row(services, bad).state is JobState.FAILED
        assert "cannot be read" in row(services, bad).error["message"]
        assert services.leases.ends(["n1"]) == {}


class TestCancel:
    def test_a_job_that_waits_is_cancelled_at_once(self, services: Services, line: str) -> None:
        job_id = ask(services)
        assert jobs.cancel(services, job_id, ADMIN) == "cancelled"
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert (job.state, job.error["error"], job.request) == (JobState.CANCELLED, "Cancelled", None)
        assert services.leases.claim(job_id, line, owner="r", node_id="n") == Refusal(job_id=job_id, why="ended")

    def test_the_owner_of_a_job_that_runs_is_asked(self, services: Services, line: str) -> None:
        job_id = ask(services)
        lease = claim(services, job_id, line)
        assert jobs.cancel(services, job_id, ADMIN) == "cancelling"
        assert row(services, job_id).state is JobState.OPEN
        assert services.leases.renew([lease]) == [2]

    def test_a_job_that_has_ended_stays_as_it_is(self, services: Services, line: str) -> None:
        job_id = ask(services)
        services.leases.finish(claim(services, job_id, line), 1, DONE, node_id="n1")
        jobs.apply_ends(services)
        assert jobs.cancel(services, job_id, ADMIN) == "done"

    def test_a_job_that_has_ended_and_is_not_written_down_yet_stays_as_it_is(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        services.leases.finish(claim(services, job_id, line), 1, DONE, node_id="n1")
        assert jobs.cancel(services, job_id, ADMIN) == "done"
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.DONE

    @pytest.mark.parametrize("claimed", [False, True])
    def test_a_job_that_redis_lost_is_cancelled_by_way_of_it_so_that_no_owner_goes_on(
        self, services: Services, line: str, claimed: bool
    ) -> None:
        job_id = ask(services, stream=True)
        lease = claim(services, job_id, line) if claimed else None
        services.redis.flushall()
        assert jobs.cancel(services, job_id, ADMIN) == "cancelled"
        assert services.leases.waiting(line) == []
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert (job.state, job.error["error"], job.request) == (JobState.CANCELLED, "Cancelled", None)
        if lease:
            assert services.leases.restore(lease, []) is None
            assert services.leases.renew([lease]) == [0]
        assert services.leases.claim(job_id, line, owner="r", node_id="n") == Refusal(job_id=job_id, why="ended")
        assert jobs.cancel(services, job_id, ADMIN) == "cancelled"

    def test_a_job_that_its_owner_restored_meanwhile_is_cancelled_all_the_same(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = ask(services, stream=True)
        lease = claim(services, job_id, line)
        services.redis.flushall()
        real = services.leases.submit

        def restored_before(*args: object, **options: object) -> int:
            assert services.leases.restore(lease, [])
            return real(*args, **options)

        monkeypatch.setattr(services.leases, "submit", restored_before)
        assert jobs.cancel(services, job_id, ADMIN) == "cancelled"
        assert services.leases.renew([lease]) == [0]
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.CANCELLED

    def test_an_unknown_job_is_not_found(self, services: Services) -> None:
        for act in (jobs.cancel, jobs.show):
            with pytest.raises(NotFound, match="jobs list"):
                act(services, "nothing", ADMIN)


class TestRecovery:
    def test_a_late_job_fails_with_its_deadline_even_while_somebody_works_on_it(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        lease = claim(services, job_id, line)
        age(services, job_id, 10, deadline=time.time() - 1)
        jobs.recover(services)
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert (job.state, job.error["error"]) == (JobState.FAILED, "DeadlineExceeded")
        assert services.leases.renew([lease]) == [0]

    def test_a_late_job_that_redis_lost_fails_with_its_deadline(self, services: Services, line: str) -> None:
        job_id = ask(services)
        lease = claim(services, job_id, line)
        age(services, job_id, 10, deadline=time.time() - 1)
        services.redis.flushall()
        jobs.recover(services)
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert (job.state, job.error["error"]) == (JobState.FAILED, "DeadlineExceeded")
        assert services.leases.restore(lease, []) is None

    def test_a_deadline_is_that_of_the_stores_whatever_the_clock_of_a_web_process_says(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now, timeout = time.time(), services.settings.request_timeout
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: now - 10 * timeout)
            job_id = ask(services)
        age(services, job_id, 10)
        jobs.recover(services)
        assert row(services, job_id).deadline == pytest.approx(now + timeout, abs=timeout / 2)
        lease = claim(services, job_id, line)
        assert lease.left == pytest.approx(timeout, abs=timeout / 2)
        assert generations.find(services, job_id, key_id="k1").left == pytest.approx(timeout, abs=timeout / 2)

    def test_a_request_that_kills_its_owners_fails_with_what_is_known_of_the_last(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services, stream=True)
        for death in range(1, DEATHS + 1):
            assert claim(services, job_id, line).deaths == death - 1
            services.redis.delete(line)
            jobs.bereave(services, "owner", line, f"reason {death}")
            waits = death < DEATHS
            assert services.leases.waiting(line) == rung_jobs(services, line) == ([job_id] if waits else [])
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert (job.state, job.error["error"]) == (JobState.FAILED, "GenerationFailed")
        assert job.error["message"] == "2 replicas died while they worked on this request. The last: reason 2"

    def test_a_request_that_its_owners_do_not_survive_fails_when_the_last_lease_has_run_out(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        age(services, job_id, 10)
        watched(services)
        for _ in range(DEATHS):
            claim(services, job_id, line)
            expire(services, job_id, line)
            jobs.recover(services)
        jobs.apply_ends(services)
        job = row(services, job_id)
        assert job.state is JobState.FAILED
        assert job.error["message"].startswith("2 replicas died while they worked on this request. The last: its lease")

    def test_the_work_of_a_node_is_tried_again_however_often_it_dies(self, services: Services) -> None:
        node = ready_node(services)
        queue = names.node_jobs_queue(node.id)
        job_id = jobs.submit_node_job(
            services, kind="fetch_model", node_id=node.id, model_id=None, request={"source": "x"}
        )
        age(services, job_id, 10)
        watched(services)
        for _ in range(DEATHS):
            claim(services, job_id, queue, node.id)
            jobs.bereave(services, "owner", queue, "it was stopped")
            claim(services, job_id, queue, node.id)
            expire(services, job_id, queue)
            jobs.recover(services)
        assert services.leases.waiting(queue) == [job_id]
        assert claim(services, job_id, queue, node.id).deaths == 2 * DEATHS

    def test_a_job_whose_owner_died_goes_back_and_is_rung(self, services: Services, line: str) -> None:
        job_id = ask(services)
        claim(services, job_id, line)
        services.redis.delete(line)
        age(services, job_id, 10)
        watched(services)
        jobs.recover(services)
        assert rung(services, line) == []  # its lease lives
        expire(services, job_id, line)
        jobs.recover(services)
        assert rung(services, line) == [f"run_generation({job_id})"]
        assert services.leases.waiting(line) == [job_id]
        assert claim(services, job_id, line).deaths == 1

    def test_a_doorbell_that_was_lost_is_rung_again_and_only_as_often_as_needed(
        self, services: Services, line: str
    ) -> None:
        first, second = ask(services), ask(services)
        for job_id in (first, second):
            age(services, job_id, 10)
        jobs.recover(services)
        assert services.redis.llen(line) == 2
        services.redis.rpop(line)
        jobs.recover(services)
        assert services.redis.llen(line) == 2
        services.redis.delete(line)
        jobs.recover(services)
        jobs.recover(services)
        assert sorted(rung(services, line)) == sorted(f"run_generation({job_id})" for job_id in (first, second))

    def test_a_job_that_has_just_come_is_let_be(self, services: Services, line: str) -> None:
        ask(services)
        services.redis.delete(line)
        jobs.recover(services)
        assert services.redis.llen(line) == 0

    def test_a_whole_answer_that_redis_lost_is_begun_again_with_a_higher_attempt(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        claim(services, job_id, line)
        request = row(services, job_id).request
        services.redis.flushall()
        age(services, job_id, 10)
        watched(services)
        jobs.recover(services)
        assert rung(services, line) == [f"run_generation({job_id})"]
        lease = claim(services, job_id, line)
        assert lease.attempt > 1000
        assert lease.request == request
        services.leases.finish(lease, 1, DONE, node_id="n1")
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.DONE

    def test_a_stream_that_redis_lost_goes_on_for_who_has_seen_nothing_and_fails_for_who_has(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services, stream=True)
        lease = claim(services, job_id, line)
        services.leases.append([(lease, 1, [Delta(text="a"), Delta(text="b")])])
        listener = Listener(services.redis)
        shown, waiting = listener.open(job_id).entries(), listener.open(job_id).entries()
        assert [next(shown).id for _ in range(2)] == ["1-1", "1-2"]
        services.redis.flushall()
        age(services, job_id, 10)
        watched(services)
        jobs.recover(services)
        assert services.leases.waiting(line) == [job_id]
        assert services.leases.restore(lease, [Delta(text="a"), Delta(text="b")]) is None, "its owner comes too late"
        assert next(shown) is None, "nothing stands in the stead of what it was shown yet"
        again = claim(services, job_id, line)
        services.leases.append([(again, 1, [Delta(text=letter) for letter in "abc"])])
        services.leases.finish(again, 4, DONE, node_id="n1")
        with pytest.raises(GenerationFailed, match="lost a part of this stream"):
            next(entry for entry in shown if entry)
        seen = [entry.event for entry in waiting if entry]
        assert ("".join(each.text for each in seen[:-1]), seen[-1]) == ("abc", DONE)
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.DONE

    def test_what_redis_lost_is_left_to_its_owner_for_one_lease(self, services: Services, line: str) -> None:
        owned, lost = ask(services, stream=True), ask(services)
        lease = claim(services, owned, line)
        services.redis.flushall()
        for job_id in (owned, lost):
            age(services, job_id, 10)
        jobs.recover(services)
        assert services.leases.live([owned, lost]) == {}
        assert services.leases.restore(lease, [])
        watched(services, services.settings.lease / 2)
        jobs.recover(services)
        assert lost not in services.leases.live([lost])
        watched(services, services.settings.lease)
        jobs.recover(services)
        live = services.leases.live([owned, lost])
        assert (live[owned].state, live[owned].attempt, live[lost].state) == ("leased", 1, "waiting")

    def test_each_time_a_job_is_brought_back_its_attempts_are_above_all_before(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        first = claim(services, job_id, line)
        attempts = [first.attempt]
        for _ in range(3):
            services.redis.flushall()
            age(services, job_id, 10 + attempts[-1] / 50)
            watched(services)
            jobs.recover(services)
            attempts.append(claim(services, job_id, line).attempt)
        assert attempts == sorted(set(attempts))
        assert services.leases.restore(first, []) is None

    def test_nobody_is_judged_dead_within_a_lease_after_an_outage_unless_his_node_says_so(
        self, services: Services, line: str
    ) -> None:
        silent, dead = ask(services), ask(services)
        for job_id in (silent, dead):
            claim(services, job_id, line)
            age(services, job_id, 10)
            expire(services, job_id, line)
        services.redis.hset(names.job_key(dead), "owner", "r9.nonce")
        jobs.recover(services)
        assert services.leases.waiting(line) == []
        jobs.bereave(services, "r9", line, "it was killed")
        assert services.leases.waiting(line) == [dead]
        watched(services, services.settings.lease)
        jobs.recover(services)
        assert sorted(services.leases.waiting(line)) == sorted([dead, silent])

    def test_an_end_that_is_not_written_down_yet_is_no_loss(self, services: Services, line: str) -> None:
        job_id = ask(services, stream=True)
        services.leases.finish(claim(services, job_id, line), 1, DONE, node_id="n1")
        services.redis.delete(names.job_key(job_id))
        age(services, job_id, 10)
        jobs.recover(services)
        jobs.apply_ends(services)
        assert row(services, job_id).state is JobState.DONE

    def test_a_line_that_is_full_does_not_keep_the_others_from_being_brought_back(
        self, services: Services, line: str
    ) -> None:
        lost = [ask(services) for _ in range(services.settings.max_waiting)]
        services.redis.flushall()
        for job_id in lost:
            age(services, job_id, 10)
        newcomer = ask(services)
        other_line = names.model_queue(add_model(services, "other"))
        other = ask(services, model="other")
        services.redis.delete(names.job_key(other), names.waiting_key(other_line), other_line)
        age(services, other, 9)
        watched(services)
        jobs.recover(services)
        assert services.leases.waiting(other_line) == [other]
        assert set(services.leases.waiting(line)) == {*lost, newcomer}


class TestWhatHasLostItsSense:
    def test_a_request_that_came_back_into_the_line_of_a_removed_model_is_told(
        self, services: Services, line: str
    ) -> None:
        waits, runs, unknown = ask(services), ask(services), ask(services)
        lease = claim(services, runs, line)
        with services.db.transaction() as db:
            db.execute(text("DELETE FROM models"))
        services.redis.delete(names.job_key(unknown))
        for job_id in (waits, runs, unknown):
            age(services, job_id, 10)
        jobs.recover(services)
        jobs.apply_ends(services)
        assert [row(services, each).error["error"] for each in (waits, unknown)] == ["ModelNotFound"] * 2
        assert row(services, runs).state is JobState.OPEN  # what runs may end
        services.leases.release(lease)
        jobs.recover(services)
        jobs.apply_ends(services)
        assert row(services, runs).error["error"] == "ModelNotFound"
        assert services.redis.exists(line, names.waiting_key(line), names.leases_key(line)) == 0

    def test_a_job_is_cancelled_when_its_web_process_has_been_missed_for_long_enough(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits, runs, fresh = ask(services), ask(services), ask(services)
        lease = claim(services, runs, line)
        for job_id in (waits, runs):
            age(services, job_id, 5)
        presence.announce(services.redis, "w1")
        jobs.recover(services)
        services.redis.delete(names.web_alive_key("w1"))
        jobs.recover(services)  # once proves nothing: Redis may just have started
        assert services.leases.live([waits])[waits].state == "waiting"
        presence.announce(services.redis, "w1")
        jobs.recover(services)
        assert not services.redis.exists(names.web_missed_key("w1"))
        services.redis.delete(names.web_alive_key("w1"))
        jobs.recover(services)
        monkeypatch.setattr(presence, "MISSED", 0.0)
        jobs.recover(services)
        jobs.apply_ends(services)
        assert (row(services, waits).state, row(services, fresh).state) == (JobState.CANCELLED, JobState.OPEN)
        assert services.leases.renew([lease]) == [2]

    @pytest.mark.parametrize(
        ("keep", "left", "becomes"),
        [
            (Keep.NOT, GRACE - 5, JobState.OPEN),  # its reader's process was stopped
            (Keep.NOT, GRACE + 1, JobState.CANCELLED),
            (Keep.GRACE, GRACE + 1, JobState.CANCELLED),
            (Keep.BACKGROUND, GRACE + 1, JobState.OPEN),
        ],
    )
    def test_a_job_whose_last_reader_left_has_its_time(
        self, services: Services, line: str, keep: Keep, left: float, becomes: JobState
    ) -> None:
        job_id = ask(services)
        age(services, job_id, 5)
        gone_at = int((presence.now(services.redis) - left) * 1000)
        services.redis.hset(names.job_key(job_id), mapping={"watch": "", "left": gone_at, "keep": keep})
        jobs.recover(services)
        jobs.apply_ends(services)
        assert row(services, job_id).state is becomes

    def test_a_job_in_the_background_outlives_its_web_process(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(presence, "MISSED", 0.0)
        job_id = ask(services)
        age(services, job_id, 5)
        services.redis.hset(names.job_key(job_id), "keep", Keep.BACKGROUND)
        for _ in range(3):
            jobs.recover(services)
        assert services.leases.live([job_id])[job_id].state == "waiting"

    def test_a_job_that_redis_got_back_names_nobody_and_is_let_be(
        self, services: Services, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(presence, "MISSED", 0.0)
        job_id = ask(services)
        age(services, job_id, 5)
        services.redis.flushall()
        watched(services)
        for _ in range(3):
            jobs.recover(services)
        assert services.leases.live([job_id])[job_id].state == "waiting"


class TestWhoMaySee:
    def test_a_job_is_there_for_its_key_and_for_admins_only(self, services: Services, line: str) -> None:
        job_id = ask(services)
        owner, other = replace(ADMIN, id="k1", role="user"), replace(ADMIN, id="k2", role="user")
        assert row(services, job_id).key_id == owner.id
        for do in (jobs.show, jobs.cancel):
            with pytest.raises(NotFound):
                do(services, job_id, other)
        assert jobs.show(services, job_id, owner)["id"] == jobs.show(services, job_id, ADMIN)["id"] == job_id
        assert jobs.cancel(services, job_id, owner) == "cancelled"

    def test_the_answer_is_kept_for_its_key_only(self, services: Services, line: str) -> None:
        job_id = ask(services)
        assert generations.find(services, job_id, key_id="k1").line == line
        for wrong in ((job_id, "k2"), (job_id, ADMIN.id), ("unknown", "k1")):
            with pytest.raises(NotFound) as caught:
                generations.find(services, wrong[0], key_id=wrong[1])
            assert not isinstance(caught.value, Gone)

    def test_an_answer_that_redis_has_forgotten_is_gone_and_one_that_it_lost_comes_back(
        self, services: Services, line: str
    ) -> None:
        job_id = ask(services)
        request = services.redis.hgetall(names.job_key(job_id))
        services.redis.delete(names.job_key(job_id))
        with pytest.raises(Unavailable, match="brought back"):
            generations.find(services, job_id, key_id="k1")
        with pytest.raises(NotFound):
            generations.find(services, job_id, key_id="k2")
        services.redis.hset(names.job_key(job_id), mapping=request)
        jobs.cancel(services, job_id, ADMIN)
        jobs.apply_ends(services)
        assert generations.find(services, job_id, key_id="k1").job_id == job_id
        services.redis.delete(names.journal_key(job_id))
        with pytest.raises(Gone):
            generations.find(services, job_id, key_id="k1")

    def test_a_nodes_job_has_no_answer(self, services: Services) -> None:
        node = ready_node(services)
        job_id = jobs.submit_node_job(
            services, kind="fetch_model", node_id=node.id, model_id=None, request={"source": "x"}
        )
        with pytest.raises(NotFound):
            generations.find(services, job_id, key_id="")


class TestShowing:
    def test_a_job_is_shown_with_what_is_true_now(self, services: Services, line: str) -> None:
        node = ready_node(services)
        job_id = ask(services)
        assert jobs.show(services, job_id, ADMIN)["live"] == "waiting"
        claim(services, job_id, line, node.id)
        shown = jobs.show(services, job_id, ADMIN)
        assert (shown["state"], shown["live"], shown["node"], shown["model"]) == ("open", "leased", "n1", "m")
        assert "request" not in shown

    def test_the_progress_of_a_nodes_job_is_shown(self, services: Services) -> None:
        node = ready_node(services)
        job_id = jobs.submit_node_job(
            services, kind="fetch_model", node_id=node.id, model_id=None, request={"source": "x"}
        )
        lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
        services.leases.append([(lease, 1, [Progress(stage="downloading", done=5, total=10, unit="bytes")])])
        shown = jobs.show(services, job_id, ADMIN)
        assert shown["progress"] == {"stage": "downloading", "done": 5, "total": 10, "unit": "bytes", "note": ""}
        assert shown["usage"] is None

    def test_a_list_is_narrowed_by_state_and_kind_the_newest_first(self, services: Services, line: str) -> None:
        old, new = ask(services), ask(services)
        age(services, old, 5)
        jobs.cancel(services, old, ADMIN)
        jobs.apply_ends(services)

        def ids(states: tuple = (), kinds: tuple = (), limit: int = 9) -> list[str]:
            return [job["id"] for job in jobs.listed(services, states=states, kinds=kinds, limit=limit)]

        assert ids() == [new, old]
        assert ids(limit=1) == [new]
        assert ids(states=("cancelled",)) == [old]
        assert ids(kinds=("embedding",)) == []


def test_a_node_that_asks_to_join_is_no_node_of_a_job(services: Services, line: str) -> None:
    join(services)
    assert jobs.show(services, ask(services), ADMIN)["node"] is None


class TestWatching:
    def test_leases_have_been_watched_since_the_first_look_without_a_break(
        self, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(presence, "JUDGED", 3600.0)
        assert presence.watched_for(redis_client) == 0.0
        looks = [presence.watched_for(redis_client) for _ in range(3)]
        assert 0 < looks[0] < looks[1] < looks[2]
        monkeypatch.setattr(presence, "JUDGED", 0.05)
        presence.watched_for(redis_client)
        assert wait_for(lambda: not redis_client.exists(names.WATCHED_SINCE)), "nobody looked"
        monkeypatch.setattr(presence, "JUDGED", 3600.0)
        assert presence.watched_for(redis_client) == 0.0
        assert presence.watched_for(redis_client) > 0.0
        redis_client.flushall()
        assert presence.watched_for(redis_client) == 0.0

    def test_a_redis_that_cannot_be_reached_is_unavailable(self) -> None:
        with pytest.raises(Unavailable):
            presence.watched_for(redis.Redis(port=1))
