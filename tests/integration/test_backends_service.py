"""Backends on nodes as an admin changes them: on one node now, on many when they are there, and what becomes of that."""

from dataclasses import replace

import pytest
from cluster_data import SECRET, claim, join, node_named, ready_node
from sqlalchemy import text

from localai_q import __version__, names
from localai_q.cluster.backends import MOST_ATTEMPTS, Op, WishState
from localai_q.cluster.events import End
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import Conflict, NotFound
from localai_q.gallery import catalog
from localai_q.gallery.catalog import External
from localai_q.services import backends, galleries, jobs, nodes
from localai_q.services.wiring import Services
from localai_q.store import backends as wish_rows
from localai_q.store import jobs as job_rows
from localai_q.store import nodes as node_rows

ECHO = {"name": "echo", "version": "1", "digest": "a" * 64, "build": "cpu", "installed_at": 1.0}


def reports(services: Services, node: Node, *found: dict) -> Node:
    """A node says which backends it has."""
    nodes.heartbeat(services, node, hardware={"backends": list(found)})
    return node_named(services, node.name)


def open_jobs(services: Services, node: Node) -> list:
    with services.db.transaction() as db:
        return job_rows.open_in(db, names.node_jobs_queue(node.id))


def end(services: Services, node: Node, state: JobState = JobState.DONE, error: str = "") -> None:
    """The node's one open job ends."""
    (job,) = open_jobs(services, node)
    record = {"error": "Unavailable", "message": error} if error else None
    with services.db.transaction() as db:
        job_rows.end(db, job.id, End(state=state, error=record), attempt=1)


def wishes(services: Services) -> list:
    with services.db.transaction() as db:
        return wish_rows.every(db)


def past_pause(services: Services) -> None:
    for wish in wishes(services):
        with services.db.transaction() as db:
            wish_rows.note(db, wish, pause=-1.0)


def states(told: dict) -> dict[str, str]:
    return {node["node_name"]: node["status"] for node in told["nodes"]}


def test_a_change_on_a_node_is_a_job_and_the_same_one_twice_is_one(services: Services) -> None:
    node = ready_node(services)
    first = backends.change(services, node, Op.INSTALL, "echo")
    assert backends.change(services, node, Op.INSTALL, "echo") == first
    (job,) = open_jobs(services, node)
    assert (job.id, job.kind) == (first, "install_backend")
    lease = claim(services, first, job.line, node.id)
    assert lease.request == {"kind": "install_backend", "backend": "echo"}


@pytest.mark.parametrize("op", [Op.UPGRADE, Op.DELETE])
def test_only_what_a_node_has_can_be_upgraded_or_deleted_there(services: Services, op: Op) -> None:
    node = ready_node(services)
    with pytest.raises(NotFound, match=f"cannot {op} backend 'echo': it does not have it"):
        backends.change(services, node, op, "echo")
    node = reports(services, node, ECHO)
    backends.change(services, node, op, "echo")
    assert [job.kind for job in open_jobs(services, node)] == [f"{op}_backend"]


def test_a_backend_that_nobody_knows_and_a_node_that_is_away_are_refused(services: Services) -> None:
    node = ready_node(services)
    with pytest.raises(NotFound, match="no backend 'ghost'"):
        backends.change(services, node, Op.INSTALL, "ghost")
    with pytest.raises(NotFound, match="no backend 'ghost'"):
        backends.change_everywhere(services, Op.INSTALL, "ghost")
    nodes.deregister(services, node)
    with pytest.raises(Conflict, match=r"is offline.*waits for it"):
        backends.change(services, node_named(services, node.name), Op.INSTALL, "echo")


def test_a_request_for_no_node_is_refused_with_the_reasons(services: Services) -> None:
    with pytest.raises(Conflict, match="there is no node"):
        backends.change_everywhere(services, Op.INSTALL, "echo")
    ready_node(services)
    with pytest.raises(Conflict, match="n1: it does not have it"):
        backends.change_everywhere(services, Op.UPGRADE, "echo")
    with pytest.raises(NotFound, match="no node 'n9'"):
        backends.change_everywhere(services, Op.INSTALL, "echo", only=("n9",))
    assert wishes(services) == []


def test_what_is_installed_and_that_versions_differ_is_shown(services: Services) -> None:
    one, two = ready_node(services, "n1"), ready_node(services, "n2")
    reports(services, one, ECHO)
    assert backends.listed(services)[0]["drift"] is False
    reports(services, two, {**ECHO, "digest": "b" * 64})
    (shown,) = backends.listed(services)
    assert (shown["name"], shown["drift"]) == ("echo", True)
    assert [(node["node_name"], node["digest"][0]) for node in shown["nodes"]] == [("n1", "a"), ("n2", "b")]
    available = {entry["name"]: entry["nodes"] for entry in backends.available(services)}
    assert available["echo"] == ["n1", "n2"]
    assert available["xllamacpp"] == []


def test_what_a_node_has_of_another_version_is_to_be_upgraded(services: Services) -> None:
    one, two, old = (ready_node(services, name) for name in ("n1", "n2", "old"))
    for node, version in ((one, __version__), (two, __version__), (old, "0.0")):
        with services.db.transaction() as db:
            node_rows.heard_of(db, node.id, hardware=None, version=version)
    available = catalog.backend("echo").version
    reports(services, one, {**ECHO, "version": available})
    assert backends.upgrades(services) == {}
    for node in (two, old):
        reports(services, node, {**ECHO, "version": "0.1"})
    (told,) = backends.upgrades(services).values()
    assert (told["backend_name"], told["installed_version"], told["available_version"]) == ("echo", "0.1", available)
    assert [(node["node_name"], node["upgradable"]) for node in told["node_drift"]] == [("n2", True), ("old", False)]


@pytest.mark.parametrize("auto", [True, False])
def test_what_is_to_be_upgraded_is_by_itself_only_where_a_setting_says_so(services: Services, auto: bool) -> None:
    nodes_of = [ready_node(services, name) for name in ("n1", "n2")]
    for node in nodes_of:
        with services.db.transaction() as db:
            node_rows.heard_of(db, node.id, hardware=None, version=__version__)
        reports(services, node, {**ECHO, "version": "0.1"})
    backends.change_everywhere(services, Op.DELETE, "echo", only=["n2"])
    settings = services.settings.model_copy(update={"auto_upgrade": auto})
    assert set(backends.check_upgrades(replace(services, settings=settings))) == {"echo"}
    ops = {wish.node_id: wish.op for wish in wishes(services)}
    assert ops == {nodes_of[1].id: Op.DELETE} | ({nodes_of[0].id: Op.UPGRADE} if auto else {})


def test_a_request_reaches_all_nodes_and_those_that_were_away_when_they_return(services: Services) -> None:
    here, away = ready_node(services, "here"), ready_node(services, "away")
    nodes.deregister(services, away)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    backends.fulfil(services)
    assert len(open_jobs(services, here)) == 1
    assert open_jobs(services, away) == []
    end(services, here)
    backends.fulfil(services)
    told = backends.operation(services, told["uuid"])
    assert states(told) == {"here": "done", "away": "open"}
    assert (told["processed"], told["progress"], told["error"]) == (False, 50.0, None)
    join(services, "away", SECRET)
    backends.fulfil(services)
    end(services, away)
    backends.fulfil(services)
    assert backends.operation(services, told["uuid"])["processed"] is True


def test_a_wish_that_fails_is_tried_again_after_a_pause_and_given_up_in_the_end(services: Services) -> None:
    node = ready_node(services)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    for attempt in range(1, MOST_ATTEMPTS + 1):
        backends.fulfil(services)
        end(services, node, JobState.FAILED, "no network")
        backends.fulfil(services)
        (wish,) = wishes(services)
        assert (wish.attempts, wish.last_error, wish.job_id) == (attempt, "no network", None)
        backends.fulfil(services)
        assert open_jobs(services, node) == []
        past_pause(services)
    assert wish.state is WishState.DEAD
    backends.fulfil(services)
    assert open_jobs(services, node) == []
    told = backends.operation(services, told["uuid"])
    assert (told["processed"], told["error"]) == (True, "n1: no network")
    again = backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    assert len(open_jobs(services, node)) == 1
    with pytest.raises(NotFound):
        backends.operation(services, told["uuid"])
    assert states(backends.operation(services, again["uuid"])) == {"n1": "open"}


def test_an_attempt_that_the_nodes_absence_has_ended_does_not_count(services: Services) -> None:
    node = ready_node(services)
    backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    nodes.deregister(services, node)
    backends.fulfil(services)
    (wish,) = wishes(services)
    assert (wish.state, wish.attempts, wish.job_id) == (WishState.OPEN, 0, None)
    assert "has left" in wish.last_error


def test_an_attempt_that_ended_with_the_nodes_process_does_not_count(services: Services) -> None:
    node = ready_node(services)
    backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    join(services, node.name)  # a new process of it, before anybody has noticed that the old one is gone
    backends.fulfil(services)
    (wish,) = wishes(services)
    assert (wish.state, wish.attempts, wish.job_id) == (WishState.OPEN, 0, None)
    assert "was started anew" in wish.last_error
    backends.fulfil(services)
    assert len(open_jobs(services, node)) == 1


def test_a_later_wish_takes_the_place_of_the_one_before(services: Services) -> None:
    node = reports(services, ready_node(services), ECHO)
    backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    backends.change_everywhere(services, Op.DELETE, "echo")
    backends.fulfil(services)
    assert sorted(job.kind for job in open_jobs(services, node)) == ["delete_backend", "install_backend"]
    assert [wish.op for wish in wishes(services)] == [Op.DELETE]


def test_what_is_not_done_can_be_taken_back(services: Services) -> None:
    node, away = ready_node(services, "n1"), ready_node(services, "n2")
    nodes.deregister(services, away)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    told = backends.give_up(services, told["uuid"])
    assert states(told) == {"n1": "cancelled", "n2": "cancelled"}
    jobs.apply_ends(services)
    assert open_jobs(services, node) == []
    with pytest.raises(NotFound, match="no operation"):
        backends.give_up(services, "nothing")


def test_a_job_that_somebody_cancels_ends_its_wish(services: Services) -> None:
    node = ready_node(services)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.fulfil(services)
    end(services, node, JobState.CANCELLED)
    backends.fulfil(services)
    assert states(backends.operation(services, told["uuid"])) == {"n1": "cancelled"}


def test_wishes_go_with_their_node_and_what_ended_is_forgotten(services: Services) -> None:
    node = ready_node(services)
    backends.change_everywhere(services, Op.INSTALL, "echo")
    backends.prune(services, days=0)
    assert len(wishes(services)) == 1
    backends.fulfil(services)
    end(services, node)
    backends.fulfil(services)
    backends.prune(services, days=0)
    assert wishes(services) == []
    backends.change_everywhere(services, Op.INSTALL, "echo")
    nodes.remove(services, node.id, force=True)
    assert wishes(services) == []


def give(services: Services, name: str = "mine", tag: str = "1", **more: object) -> dict:
    return backends.install_external(services, External(uri=f"oci://x.example/b:{tag}", name=name, **more))


def test_what_an_admin_gives_again_takes_the_place_of_what_was_given_before(services: Services) -> None:
    node = ready_node(services)
    give(services, alias="chatty")
    give(services, tag="2", alias="chatty")
    assert [(entry.name, entry.version, entry.alias) for entry in galleries.external(services)] == [
        ("mine", "2", "chatty")
    ]
    backends.fulfil(services)
    (job,) = open_jobs(services, node)
    with services.db.transaction() as db:
        request = job_rows.request(db, job.id)
    assert request["entry"]["builds"]["cpu"]["archive"]["source"] == "oci://x.example/b:2"
    assert "alias" not in request["entry"]
    for name, alias in (("chatty", None), ("other", "chatty"), ("other", "mine")):
        with pytest.raises(Conflict, match="There is a backend 'mine' already"):
            give(services, name, alias=alias)


def test_a_backend_is_installed_by_its_alias_too(services: Services) -> None:
    node = ready_node(services)
    give(services, alias="chatty")
    job_id = backends.change(services, node, Op.INSTALL, "chatty")
    assert backends.change_everywhere(services, Op.INSTALL, "chatty")["gallery_element_name"] == "mine"
    with services.db.transaction() as db:
        request = job_rows.request(db, job_id)
    assert (request["backend"], request["entry"]["name"]) == ("mine", "mine")


def test_what_is_given_for_one_node_is_known_to_all_and_installed_by_that_one(services: Services) -> None:
    node, other = ready_node(services), ready_node(services, "n2")
    given = External(uri="oci://x.example/b:1", name="mine", alias="chatty")
    job_id = backends.install_external_on(services, node, given)
    assert backends.install_external_on(services, node, given) == job_id
    with services.db.transaction() as db:
        request = job_rows.request(db, job_id)
    assert (request["kind"], request["entry"]["name"]) == ("install_backend", "mine")
    backends.fulfil(services)
    assert (wishes(services), open_jobs(services, other)) == ([], [])
    assert [entry.alias for entry in galleries.external(services)] == ["chatty"]
    backends.change(services, other, Op.INSTALL, "chatty")


def test_what_cannot_be_given_for_one_node_is_not_remembered(services: Services) -> None:
    node = ready_node(services)
    with pytest.raises(Conflict, match="There is a backend 'echo' already"):
        backends.install_external_on(services, node, External(uri="oci://x.example/b:1", name="echo"))
    nodes.deregister(services, node)
    away = node_named(services, node.name)
    with pytest.raises(Conflict, match=r"is offline.*waits for it"):
        backends.install_external_on(services, away, External(uri="oci://x.example/b:1", name="mine"))
    assert galleries.external(services) == []


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ("UPDATE nodes SET state = 'offline'", Conflict, "is offline"),
        ("UPDATE nodes SET approved = false", Conflict, "it is not approved"),
        ("DELETE FROM nodes", NotFound, "no node 'n1'"),
    ],
)
def test_what_is_given_for_a_node_that_cannot_have_it_leaves_what_was_given_before(
    services: Services, change: str, error: type[Exception], says: str
) -> None:
    """Also where the node went away after it was found."""
    ready_node(services, "n2")
    give(services)
    node = ready_node(services)
    with services.db.transaction() as db:
        db.execute(text(change))
    with pytest.raises(error, match=says):
        backends.install_external_on(services, node, External(uri="oci://x.example/b:2", name="mine"))
    assert [entry.version for entry in galleries.external(services)] == ["1"]


def test_what_an_admin_gave_is_gone_from_all_nodes_when_it_is_deleted(services: Services) -> None:
    here, coming, away = (ready_node(services, name) for name in ("here", "coming", "away"))
    nodes.deregister(services, away)
    give(services)
    reports(services, here, {**ECHO, "name": "mine"})
    told = backends.change_everywhere(services, Op.DELETE, "mine", only=["here"])
    assert [entry.name for entry in galleries.external(services)] == ["mine"], "from one node only"
    told = backends.change_everywhere(services, Op.DELETE, "mine")
    assert states(told) == {"here": "open", "coming": "open", "away": "open"}
    assert {wish.op for wish in wishes(services)} == {Op.DELETE}, "nobody is to install it any more"
    assert galleries.external(services) == []
    assert coming.id in {wish.node_id for wish in wishes(services)}


def test_what_no_node_has_is_deleted_at_once(services: Services) -> None:
    node = ready_node(services)
    give(services)
    backends.fulfil(services)
    end(services, node, JobState.CANCELLED)
    backends.fulfil(services)
    told = backends.change_everywhere(services, Op.DELETE, "mine")
    assert (told["processed"], told["progress"], told["nodes"]) == (True, 100.0, [])
    with pytest.raises(Conflict, match="No node is to delete"):
        backends.change_everywhere(services, Op.DELETE, "mine")


def test_there_are_so_many_at_most(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MOST_EXTERNAL", 1)
    ready_node(services)
    give(services)
    give(services, tag="2")
    with pytest.raises(Conflict, match="There are 1 such backends"):
        give(services, "other")


@pytest.mark.parametrize(
    ("given", "version"),
    [
        ({"uri": "https://x.example/b.tgz", "sha256": "ab" * 32}, "ab" * 6),
        ({"uri": "oci://x.example/b:_1.2"}, "x1.2"),
        ({"uri": f"oci://x.example/b@sha256:{'ab' * 32}"}, "ab" * 32),
        ({"uri": "hf://o/r/b.tgz@refs/pr/1"}, "refsxprx1"),
        ({"uri": "hf://o/r/b.tgz"}, "main"),
    ],
)
def test_the_version_of_what_an_admin_gives_is_what_its_source_tells(given: dict, version: str) -> None:
    assert External(name="mine", **given).entry.version == version
