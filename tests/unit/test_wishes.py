"""What cannot be had is looked for again after a rest that grows, or at once when something has changed that matters."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from test_placement import fleets

from localai_q.cluster.fleet import Demand, Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import MOST_REASONS, GiveUp, Note, Place, plan
from localai_q.cluster.states import NodeState, ReplicaState
from localai_q.cluster.wishes import KEPT, REST_FIRST, REST_MOST, STEP, Unmet

NOW = 10_000.0
GB = 10**9
FREE = 4 * GB // STEP * STEP  # so that a little less or more is seen to be little

NEW = Model(id="new", name="new", revision=1,
            config=ModelConfig(backend="echo", memory=6 * GB, min_replicas=2, max_replicas=2, selector={"zone": "a"}))  # fmt: skip
OLD = Model(id="old", name="old", revision=1, config=ModelConfig(backend="echo", memory=6 * GB, pinned=True))
HELD = Replica(id="r", model_id="old", node_id="n1", number=1, revision=1, state=ReplicaState.READY, slots=1,
               changed=NOW - 500, reserved=Memory(ram=6 * GB))  # fmt: skip


def node(name: str, state: NodeState = NodeState.READY, zone: str = "a", **hardware) -> Node:
    hardware = {"ram_available": FREE, "disk_free": 8 * GB, **hardware}
    return Node(id=name, name=name, state=state, approved=True, secret_hash="", labels={"zone": zone},
                hardware=hardware, last_heartbeat=NOW)  # fmt: skip


N1, AWAY = node("n1"), node("n2", NodeState.UNHEALTHY, ram_available=8 * GB)
CLUSTER = Fleet(models=[NEW, OLD], nodes=[N1, AWAY], replicas=[HELD], now=NOW)


def noted(cluster: Fleet) -> Fleet:
    """The cluster once what its plan has to note is noted."""
    notes = {action.model_id: action.unmet for action in plan(cluster) if isinstance(action, Note)}
    models = [m.model_copy(update={"unmet": notes[m.id]}) if m.id in notes else m for m in cluster.models]
    return replace(cluster, models=models)


def wish(cluster: Fleet) -> Unmet | None:
    return next(model.unmet for model in cluster.models if model.id == "new")


RESTING = noted(CLUSTER)


def test_a_wish_that_cannot_be_met_says_what_is_wanted_and_why_not_on_each_node() -> None:
    assert wish(RESTING).shown() == {
        "wanted": 2, "has": 0, "since": NOW, "reason": "min_replicas is 2",
        "nodes": {"n1": "needs 6.0 GB, 4.0 GB free (as configured)", "n2": "unhealthy"},
    }  # fmt: skip


def test_of_many_nodes_some_are_named() -> None:
    many = replace(CLUSTER, nodes=[node(f"n{number}") for number in range(50)])
    assert len(wish(noted(many)).nodes) == MOST_REASONS


def test_it_rests_for_longer_and_longer_and_is_the_same_wish() -> None:
    cluster, rests = RESTING, []
    for _ in range(9):
        found = wish(cluster)
        rests.append(found.until - cluster.now)
        assert plan(replace(cluster, now=found.until - 0.1)) == []
        cluster = noted(replace(cluster, now=found.until))
        assert wish(cluster).since == NOW
    assert rests[:4] == [REST_FIRST, 2 * REST_FIRST, 4 * REST_FIRST, 8 * REST_FIRST]
    assert max(rests) == rests[-1] == REST_MOST


def edited(model: Model, **config) -> Model:
    return model.model_copy(update={"revision": 2, "config": model.config.model_copy(update=config)})


def with_models(*models: Model) -> dict:
    return {"models": [m.model_copy(update={"unmet": wish(RESTING)}) if m.id == "new" else m for m in models]}


@pytest.mark.parametrize(
    ("event", "change"),
    [
        ("a node joins", {"nodes": [N1, AWAY, node("n3", ram_available=8 * GB)]}),
        ("one returns", {"nodes": [N1, replace(AWAY, state=NodeState.READY)]}),
        ("memory becomes free", {"nodes": [node("n1", ram_available=8 * GB), AWAY]}),
        ("a GPU's memory becomes free", {"nodes": [node("n1", gpus=[{"vram_total": 9 * GB, "vram_free": 8 * GB}]), AWAY]}),
        ("the disk is emptied", {"nodes": [node("n1", disk_free=9 * GB), AWAY]}),
        ("a label is given", {"nodes": [replace(N1, labels={"zone": "a", "more": "b"}), AWAY]}),
        ("a limit is changed", {"nodes": [replace(N1, given_slots=2), AWAY]}),
        ("a budget is changed", {"nodes": [replace(N1, given_budget="20GB"), AWAY]}),
        ("a replica ends", {"replicas": []}),
        ("a replica is ready, and takes less than was thought", {"replicas": [replace(HELD, state=ReplicaState.LOADING)]}),
        ("a replica fails", {"replicas": [replace(HELD, state=ReplicaState.FAILED)]}),
        ("the model is edited", with_models(edited(NEW, memory=7 * GB), OLD)),
        ("another is edited", with_models(NEW, edited(OLD, pinned=False))),
        ("another is removed", with_models(NEW)),
    ],
)  # fmt: skip
def test_the_rest_ends_with_the_event_that_could_make_room(event: str, change: dict) -> None:
    assert plan(replace(RESTING, now=NOW + 1)) == []
    assert plan(replace(RESTING, now=NOW + 1, **change)), event


@pytest.mark.parametrize("less", [1, STEP - 1])
def test_what_changes_all_the_time_ends_no_rest(less: int) -> None:
    assert plan(replace(RESTING, nodes=[node("n1", ram_available=FREE + less, cpus=5), AWAY])) == []


def test_where_there_is_room_again_it_is_taken_and_the_wish_forgotten() -> None:
    roomy = replace(RESTING, nodes=[replace(node("n1", ram_available=20 * GB), given_slots=2)], replicas=[])
    actions = plan(roomy)
    assert [type(action) for action in actions] == [Place, Place]
    there = [replace(HELD, id=str(number), model_id="new", number=number) for number in (1, 2)]
    assert plan(replace(roomy, replicas=there)) == [Note(model_id="new", unmet=None)]


def test_a_wish_that_is_not_repeated_is_seen_for_a_while_and_a_changed_one_is_not() -> None:
    urgent = Model(id="new", name="new", revision=1, config=ModelConfig(backend="echo", memory=50 * GB))
    gone = replace(noted(replace(CLUSTER, models=[urgent, OLD], demand={"new": Demand(waiting=1)})), demand={})
    until = wish(gone).until
    assert plan(replace(gone, now=until + KEPT - 1)) == []
    assert plan(replace(gone, now=until + KEPT)) == [Note(model_id="new", unmet=None)]
    edit = gone.models[0].model_copy(update={"revision": 2})
    assert plan(replace(gone, models=[edit, OLD])) == [Note(model_id="new", unmet=None)]


def test_who_waits_for_what_can_never_fit_is_told_at_once_though_the_wish_rests() -> None:
    urgent = Model(id="new", name="new", revision=1, config=ModelConfig(backend="echo", memory=50 * GB))
    asked = replace(CLUSTER, models=[urgent, OLD], demand={"new": Demand(waiting=1)})
    first = [action for action in plan(asked) if isinstance(action, GiveUp)]
    assert first
    assert plan(replace(noted(asked), now=NOW + 1)) == first


def test_who_waits_gets_room_made_though_the_wish_of_nobody_rests() -> None:
    idle = edited(OLD, pinned=False).model_copy(update={"revision": 1})
    resting = noted(replace(CLUSTER, models=[NEW, idle]))
    assert plan(resting) == []
    (stop,) = plan(replace(resting, demand={"new": Demand(waiting=1)}))
    assert stop.replica_id == "r"


@settings(max_examples=400, deadline=None)
@given(fleets())
def test_a_rest_hides_nothing_that_could_be_done(cluster: Fleet) -> None:
    done = [action for action in plan(cluster) if not isinstance(action, Note)]
    assert [action for action in plan(noted(cluster)) if not isinstance(action, Note)] == done
