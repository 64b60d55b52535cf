"""Which replica a request is rung for: two replicas that the test plays, two web processes, the real stores between them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster_data import add_model, model_named, ready_node, rung
from sqlalchemy import text
from waiting import LIMIT, wait_for

from localai_q import names
from localai_q.bus import pressure
from localai_q.bus.leases import Lease, Refusal
from localai_q.cluster.capacity import Booking
from localai_q.cluster.events import End
from localai_q.cluster.jobs import Keep
from localai_q.cluster.memory import Memory
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.errors import Busy, ModelDisabled, ModelNotFound, Unavailable
from localai_q.services import generations, jobs, models, nodes, replicas, snapshots
from localai_q.services.router import COSTLY, FRESH, STALE, UNCLAIMED, Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import nodes as node_rows
from localai_q.store import replicas as rows

LATER = UNCLAIMED + 0.01


@pytest.fixture(autouse=True)
def what_is_on_its_way_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this machine takes from one step of a test to the next."""
    monkeypatch.setattr("localai_q.services.router.ON_ITS_WAY", 3600.0)


class Play:
    """A model with two ready replicas on two nodes."""

    def __init__(self, services: Services, **config: object) -> None:
        self.services = services
        self.model_id = add_model(services, slots=4, **config)
        self.line = names.model_queue(self.model_id)
        self.replicas: list[str] = []
        self.one, self.two = self.add("n1"), self.add("n2")

    def add(self, node_name: str) -> str:
        node = ready_node(self.services, node_name)
        revision = model_named(self.services, "m").revision
        with self.services.db.transaction() as db:
            placed = rows.place(db, model_id=self.model_id, node_id=node.id, number=1, revision=revision, slots=4,
                                booking=Booking(memory=Memory()))  # fmt: skip
            assert placed
            for state in (ReplicaState.INSTALLING, ReplicaState.LOADING, ReplicaState.READY):
                assert rows.move(db, placed.id, state)
        self.replicas.append(placed.id)
        return placed.id

    def web(self) -> Router:
        return Router(self.services, Snapshots(self.services))

    def ask(self, web: Router, said: str = "x") -> str:
        request = GenerationRequest(kind="chat", model="m", body={"messages": [{"role": "user", "content": said}]})
        job_id = names.new_id()
        return generations.submit(
            self.services, web, request, key_id="k", job_id=job_id, watcher="w", keep=Keep.NOT
        ).job_id

    def told(self, job_id: str) -> str:
        """Which replica's bell was rung for it; "" for the model's."""
        rang = f"run_generation({job_id})"
        found = [each for each in self.replicas if rang in rung(self.services, names.replica_queue(each))]
        assert bool(found) != (rang in rung(self.services, self.line)), "one bell, on one queue"
        return found[0] if found else ""

    def claim(self, job_id: str, replica_id: str) -> Lease:
        lease = self.services.leases.claim(job_id, self.line, owner=f"{replica_id}.nonce", node_id="n1",
                                           revision=1)  # fmt: skip
        assert isinstance(lease, Lease), lease
        return lease

    def do(self, web: Router, job_id: str, replica_id: str) -> None:
        """The replica takes the job and does it; the web process hears of it."""
        lease = self.claim(job_id, replica_id)
        web.heard(job_id)
        self.services.leases.finish(lease, 1, End(state=JobState.DONE), node_id="n1")
        web.ended(job_id, self.line)
        web.tend(time.monotonic())


@pytest.fixture
def play(services: Services) -> Play:
    return Play(services)


def counted(web: Router, play: Play) -> int:
    """The jobs that this process takes to be under way."""
    view = web._views[play.line]
    return sum(view._counts.values()) + view._others_waiting


SLOTS = 8  # of both replicas


def ready(web: Router) -> set[str]:
    """The replicas that this process takes to be ready."""
    return {each.id for each in web._snapshots.now().replicas if each.state is ReplicaState.READY}


def raising(error: Exception):
    """A function that raises this, whatever it is called with."""

    def fail(*_: object) -> None:
        raise error

    return fail


def works(seconds: float) -> None:
    """Keep the processor busy for so long."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


LONG = "Once upon a time there was a lighthouse. " * 50


class TestAffinity:
    def test_a_beginning_that_was_read_goes_where_it_was_read(self, play: Play) -> None:
        web = play.web()
        play.do(web, play.ask(web, LONG), play.two)  # by whom it was done counts, not who was told
        assert {play.told(play.ask(web, LONG + str(turn))) for turn in range(2)} == {play.two}

    def test_other_prompts_are_shared_out(self, play: Play) -> None:
        web = play.web()
        assert {play.told(play.ask(web, f"{turn}" * 2000)) for turn in range(4)} == {play.one, play.two}

    def test_what_nobody_has_taken_yet_is_not_taken_for_read(self, play: Play) -> None:
        web, now = play.web(), time.monotonic()
        first = play.told(play.ask(web, LONG))
        web.tend(now)
        assert play.told(play.ask(web, LONG)) != first

    def test_a_model_can_do_without(self, services: Services) -> None:
        play = Play(services, route_policy="round_robin")
        web = play.web()
        for _ in range(3):
            play.do(web, play.ask(web, LONG), play.two)
        assert {play.told(play.ask(web, LONG)) for _ in range(2)} == {play.one, play.two}

    def test_a_replica_that_is_not_ready_is_forgotten(self, play: Play, services: Services) -> None:
        web, third = play.web(), play.add("n3")
        play.do(web, play.ask(web, LONG), play.two)
        with services.db.transaction() as db:
            rows.move(db, play.two, ReplicaState.STOPPING)
        assert wait_for(lambda: play.two not in ready(web)), "the registry is read again"
        assert {play.told(play.ask(web, LONG)) for _ in range(2)} == {play.one, third}
        web.tend(time.monotonic())
        assert web._prefixes.holders == set()

    def test_web_processes_share_what_they_have_seen(self, play: Play) -> None:
        here, there, heard = play.web(), play.web(), threading.Event()
        hear = there.hear
        there.hear = lambda *message: (heard.set(), hear(*message))  # type: ignore[method-assign, assign, func-returns-value]
        there.start()
        assert wait_for(lambda: play.services.redis.publish(names.PREFIXES_CHANNEL, "{}") and heard.is_set())
        play.do(here, play.ask(here, LONG), play.two)
        assert wait_for(lambda: there._prefixes.holders) == {play.two}
        assert {play.told(play.ask(there, LONG)) for _ in range(2)} == {play.two}

    @pytest.mark.parametrize("message", ["", "{}", "[]", '{"from": "x", "seen": 5}', '{"from": "x", "seen": [["r"]]}',
                                         '{"from": "x", "seen": [["r", "zz"]]}', '{"from": "x", "seen": [["r", 5]]}'])  # fmt: skip
    def test_what_is_no_such_message_is_let_be(self, play: Play, message: str) -> None:
        web = play.web()
        web.hear(message, 0.0)
        assert web._prefixes.holders == set()


class TestLoad:
    def test_what_other_processes_have_under_way_counts(self, play: Play) -> None:
        for _ in range(3):
            play.claim(play.ask(play.web()), play.one)
        web = play.web()
        assert [play.told(play.ask(web)) for _ in range(3)] == [play.two] * 3

    def test_many_jobs_are_read_piece_by_piece(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        web = play.web()
        asked = [play.ask(web) for _ in range(5)]
        for job_id in asked:
            play.claim(job_id, play.one)
        whole = play.services.leases.at_work(play.line)
        monkeypatch.setattr("localai_q.bus.leases.AT_ONCE", 2)
        assert play.services.leases.at_work(play.line) == whole == (dict.fromkeys(asked, play.one), 0)

    def test_what_is_much_work_to_read_is_read_more_seldom(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        web, at_work = play.web(), play.services.leases.at_work
        for work, pause in ((0.0, FRESH), (0.1, 0.1 * COSTLY), (0.5, STALE)):
            web._views.clear()
            monkeypatch.setattr(
                play.services.leases, "at_work", lambda line, work=work: (works(work), at_work(line))[1]
            )
            began = time.monotonic()
            play.ask(web)
            assert web._views[play.line].due - began >= pause

    def test_a_registry_that_is_much_work_to_read_is_read_more_seldom_and_by_one(
        self, play: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, reading, go_on = Snapshots(play.services), threading.Event(), threading.Event()
        monkeypatch.setattr(snapshots, "COSTLY", 1e9)
        monkeypatch.setattr(snapshots, "STALE", 3600.0)
        first = found.now()
        time.sleep(FRESH)
        assert found.now() is first, "at the price of a billion times its work"
        with monkeypatch.context() as patched, ThreadPoolExecutor() as pool:
            patched.setattr(snapshots, "take", lambda _: (reading.set(), go_on.wait(LIMIT), first)[2])
            patched.setattr(found, "_lasts", 0.0)
            reader = pool.submit(found.now)
            assert reading.wait(LIMIT)
            assert found.now() is first, "who does not read it does not wait"
            go_on.set()
            assert reader.result() is first
        assert found.now(younger_than=0.0) is not first

    def test_what_cannot_be_read_is_read_again(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        web = play.web()
        with monkeypatch.context() as patched:
            patched.setattr(play.services.leases, "at_work", raising(Unavailable("away")))
            with pytest.raises(Unavailable):
                play.ask(web)
        play.claim(play.ask(play.web()), play.one)
        web._view(play.line, time.monotonic() + FRESH)
        assert counted(web, play) == 1

    def test_own_requests_count_at_once_until_they_end(self, play: Play) -> None:
        web = play.web()
        asked = [play.ask(web) for _ in range(8)]
        told = [play.told(job_id) for job_id in asked]
        assert sorted(told) == sorted([play.one, play.two] * 4)
        assert play.told(play.ask(web)) == "", "no slot is free: whoever has one first"
        web.ended(asked[0], play.line)
        web.ended(asked[1], play.line)
        assert {play.told(play.ask(web))} <= {told[0], told[1]}

    def test_a_request_that_was_refused_does_not_count(self, play: Play) -> None:
        web = play.web()
        for _ in range(20):
            play.ask(web)
        for _ in range(3):
            with pytest.raises(Busy):
                play.ask(web)
        assert counted(web, play) == 20

    def test_jobs_that_end_unheard_are_forgotten(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("localai_q.services.router.ON_ITS_WAY", 0.0)
        web = play.web()
        lease = play.claim(play.ask(web), play.one)
        play.services.leases.finish(lease, 1, End(state=JobState.DONE), node_id="n1")
        web._view(play.line, time.monotonic() + 1)
        assert counted(web, play) == 0


class TestDoorbells:
    def test_what_one_replica_does_not_take_is_rung_for_all_once(self, play: Play) -> None:
        web, now = play.web(), time.monotonic()
        job_id = play.ask(web)
        told = play.told(job_id)
        assert told
        web.tend(now)
        assert rung(play.services, play.line) == [], "it is not due yet"
        web.tend(time.monotonic() + LATER)
        web.tend(time.monotonic() + 2 * LATER)
        web.tend(time.monotonic() + 9 * LATER)
        assert rung(play.services, play.line) == [f"run_generation({job_id})"]

    def test_who_does_not_take_it_is_left_alone_until_it_takes_something(self, play: Play) -> None:
        web = play.web()
        job_id = play.ask(web)
        deaf = play.told(job_id)
        [other] = {play.one, play.two} - {deaf}
        web.tend(time.monotonic() + LATER)
        assert {play.told(play.ask(web)) for _ in range(2)} == {other}
        play.claim(job_id, deaf)
        web.tend(time.monotonic() + 9 * LATER)
        assert deaf in {play.told(play.ask(web)) for _ in range(2)}

    def test_it_is_rung_by_itself_when_its_time_has_come(self, play: Play) -> None:
        web = play.web()
        web.start()
        began = time.monotonic()
        job_id = play.ask(web)
        assert wait_for(lambda: rung(play.services, play.line)) == [f"run_generation({job_id})"]
        assert time.monotonic() - began >= UNCLAIMED

    def test_what_was_taken_is_not_rung_again(self, play: Play) -> None:
        web = play.web()
        taken, heard = play.ask(web, LONG), play.ask(web, LONG)
        play.claim(taken, play.one)
        web.heard(heard)
        play.claim(heard, play.two)
        web.tend(time.monotonic() + LATER)
        assert rung(play.services, play.line) == []
        assert web._watched == {}

    def test_the_second_bell_does_no_harm(self, play: Play) -> None:
        web = play.web()
        job_id = play.ask(web)
        web.tend(time.monotonic() + LATER)
        play.claim(job_id, play.one)
        refusal = play.services.leases.claim(job_id, play.line, owner=f"{play.two}.x", node_id="n2", revision=1)
        assert isinstance(refusal, Refusal)

    def test_many_that_are_due_cost_one_look(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        web = play.web()
        asked = [play.ask(web) for _ in range(6)]
        looks: list[list[str]] = []
        holders = play.services.leases.holders
        monkeypatch.setattr(play.services.leases, "holders", lambda ids: (looks.append(list(ids)), holders(ids))[1])
        web.tend(time.monotonic() + LATER)
        assert [sorted(each) for each in looks] == [sorted(asked)]

    def test_a_bell_that_cannot_be_rung_is_rung_at_the_next_look(
        self, play: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        web = play.web()
        job_id = play.ask(web)
        with monkeypatch.context() as patched:
            patched.setattr(play.services.doorbells, "ring", refuse)
            with pytest.raises(Unavailable):
                web.tend(time.monotonic() + LATER)
        web.tend(time.monotonic() + LATER)
        assert rung(play.services, play.line) == [f"run_generation({job_id})"]

    def test_control_rings_for_what_a_web_process_left_behind(
        self, play: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = play.ask(play.web())  # which dies before it looks
        assert play.told(job_id)
        monkeypatch.setattr(jobs, "UNCLAIMED", 0.0)
        monkeypatch.setattr(jobs._ring_again, "__kwdefaults__", {"older_than": 0.0})
        jobs.recover(play.services)
        assert rung(play.services, play.line) == [f"run_generation({job_id})"]

    @pytest.mark.parametrize(
        "how", ["ends", "fails", "its node comes back", "its node leaves", "its node falls silent"]
    )
    def test_the_bells_of_a_replica_that_goes_are_rung_for_all(
        self, play: Play, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = [play.ask(play.web()) for _ in range(4)]
        lost = [job_id for job_id in asked if play.told(job_id) == play.one]
        assert lost or play.told(asked[0])
        leave(play.services, how, play.one, monkeypatch)
        assert set(rung(play.services, play.line)) >= {f"run_generation({job_id})" for job_id in lost}
        left = play.services.redis.exists(*names.keys_of_queue(names.replica_queue(play.one)))
        assert left == 0

    def test_a_bell_that_is_rung_too_late_for_a_replica_leaves_nothing_for_long(self, play: Play) -> None:
        web = play.web()
        job_id = play.ask(web)
        told = names.replica_queue(play.told(job_id))
        web.tend(time.monotonic() + LATER)
        kept = [key for key in names.keys_of_queue(told) if play.services.redis.exists(key)]
        assert kept
        assert all(0 < play.services.redis.ttl(key) <= 60 for key in kept)

    def test_a_bell_needs_no_note_of_its_queue(self, play: Play) -> None:
        queue = names.replica_queue(play.one)
        play.services.doorbells.ring(names.RUN_GENERATION, "j1", queue=queue)
        play.services.redis.delete(*names.keys_of_queue(queue))
        play.services.doorbells.ring(names.RUN_GENERATION, "j2", queue=queue)
        assert rung(play.services, queue) == ["run_generation(j2)"]

    def test_removing_a_model_leaves_none_of_its_queues(self, play: Play) -> None:
        play.ask(play.web())
        models.remove(play.services, "m")
        assert not list(play.services.redis.scan_iter("*replica.*"))


def refuse(*_: object, **__: object) -> None:
    raise Unavailable("away")


def leave(services: Services, how: str, replica_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with services.db.transaction() as db:
        node = node_rows.by_name(db, "n1")
    assert node is not None
    match how:
        case "ends":
            nodes.report_replica(services, node, replica_id, ReplicaState.GONE, "")
        case "fails":
            nodes.report_replica(services, node, replica_id, ReplicaState.FAILED, "killed")
        case "its node comes back":
            ready_node(services, "n1")
        case "its node leaves":
            nodes.deregister(services, node)
        case "its node falls silent":
            monkeypatch.setattr(nodes.presence, "served_for", lambda _: 1e9)
            monkeypatch.setattr(nodes.nodes, "silent", lambda *_: [node])
            nodes.watch_health(services)


class TestPressure:
    def test_what_load_keeps_from_its_replica_asks_for_one_more(self, services: Services) -> None:
        play = Play(services, max_replicas=3, min_replicas=2)
        ready_node(services, "n3")
        pressure.add(services.redis, {play.model_id: SLOTS - 1})
        web = play.web()
        play.do(web, play.ask(web, LONG), play.one)
        for _ in range(2):
            play.claim(play.ask(web, LONG), play.one)
        web._view(play.line, time.monotonic() + STALE)
        play.ask(web, LONG)
        web.tend(time.monotonic())
        assert pressure.read(services.redis, [play.model_id]) == {play.model_id: SLOTS}
        assert 0 < services.redis.ttl(names.pressure_key(play.model_id)) <= pressure.LASTS

        replicas.reconcile(services)
        assert len(every(services)) == 2, "those that have just come are to show what they do first"
        aged(services)
        replicas.reconcile(services)
        assert len(every(services)) == 3
        assert pressure.read(services.redis, [play.model_id]) == {play.model_id: 0}, "it has had its effect"

    def test_it_is_kept_while_nothing_can_be_added(self, services: Services) -> None:
        play = Play(services, max_replicas=3, min_replicas=2)
        pressure.add(services.redis, {play.model_id: SLOTS})
        aged(services)
        replicas.reconcile(services)
        assert len(every(services)) == 2, "there is no third node"
        assert pressure.read(services.redis, [play.model_id]) == {play.model_id: SLOTS}


def every(services: Services) -> list:
    with services.db.transaction() as db:
        return rows.every(db)


def aged(services: Services) -> None:
    """Let some time pass for every replica."""
    with services.db.transaction() as db:
        db.execute(text("UPDATE replicas SET changed_at = changed_at - interval '1 minute'"))


def test_a_request_is_stored_with_what_its_model_adds(play: Play, services: Services) -> None:
    models.edit(services, "m", {"parameters": {"top_k": 7}, "system_prompt": "Be brief."})
    web = Router(services, Snapshots(services))
    job_id = play.ask(web)
    with services.db.transaction() as db:
        kept = job_rows.request(db, job_id)
    assert kept["body"]["top_k"] == 7
    assert kept["body"]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_disabled_model_is_refused_whatever_a_web_process_has_read(play: Play, services: Services) -> None:
    web = Router(services, Snapshots(services))
    models.edit(services, "m", {"disabled": True})
    with pytest.raises(ModelDisabled):
        play.ask(web)
    models.edit(services, "m", {"disabled": False})
    assert play.ask(web)


def test_a_request_is_for_the_model_that_has_the_name_whatever_a_web_process_has_read(
    play: Play, services: Services
) -> None:
    web = Router(services, Snapshots(services))
    play.ask(web)
    models.remove(services, "m")
    newer = add_model(services)
    with services.db.transaction() as db:
        job = job_rows.by_id(db, play.ask(web))
    assert job
    assert (job.model_id, job.line) == (newer, names.model_queue(newer))
    models.remove(services, "m")
    with pytest.raises(ModelNotFound):
        play.ask(web)
