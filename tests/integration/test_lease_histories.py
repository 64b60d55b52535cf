"""Whatever owners do, and whenever leases run out: a job has one owner and one end, and a whole journal."""

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from leased_jobs import CANCELLED, DONE, LINE, journal, pieces, submitted, write

from localai_q import names
from localai_q.bus.leases import Append, Lease, Leases, Refusal
from localai_q.cluster.events import End

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
