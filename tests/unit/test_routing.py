"""Which line a request joins, which replica is told of it, and who is told at once that the model cannot be had."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Replica
from localai_q.cluster.routing import SAMPLE, Guards, Load, Pool, Snapshot, route
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.errors import ModelDisabled, ModelUnavailable, UnsupportedByModel

NOW = 5_000.0


def model(**config) -> Model:
    return Model(id="m1", name="Chatty", revision=1, config=ModelConfig(backend="echo", **config))


def replica(state: ReplicaState, *, of: str = "m1", age: float = 0.0, reason: str = "", failures: int = 2) -> Replica:
    return Replica(id=f"{of}{state}", model_id=of, node_id="n", number=1, revision=1, state=state, slots=1,
                   failures=failures, changed=NOW - age, reason=reason)  # fmt: skip


def send(replicas, kind="chat", **config):
    asked = model(**config)
    return route(asked, Pool.of(asked, replicas), kind, NOW)


def test_a_request_always_joins_the_line_of_its_model() -> None:
    for replicas in ([], [replica(ReplicaState.READY)], [replica(ReplicaState.LOADING)]):
        assert send(replicas).queue == "model.m1"


def test_a_disabled_model_is_asked_nothing() -> None:
    for replicas in ([], [replica(ReplicaState.READY)]):
        with pytest.raises(ModelDisabled, match=r"models edit Chatty --no-disabled"):
            send(replicas, disabled=True)


def test_a_ready_replica_serves_whatever_the_others_do() -> None:
    way = send([replica(ReplicaState.FAILED), replica(ReplicaState.READY)])
    assert not way.needs_load
    assert way.reason == "one replica is ready"


@pytest.mark.parametrize("state", COMING_UP)
def test_what_is_coming_up_needs_no_second_load(state) -> None:
    assert not send([replica(state)]).needs_load


@pytest.mark.parametrize("state", [ReplicaState.STOPPING, ReplicaState.GONE])
def test_what_is_on_its_way_out_serves_nobody(state) -> None:
    assert send([replica(state)]).needs_load


def test_replicas_of_other_models_do_not_count() -> None:
    assert send([replica(ReplicaState.READY, of="m2")]).needs_load


def test_a_model_that_has_failed_twice_in_a_row_is_refused_with_the_reason() -> None:
    failed = replica(ReplicaState.FAILED, reason="no room on the card", failures=2)
    with pytest.raises(ModelUnavailable, match=r"Chatty.*no room on the card"):
        send([failed])


def test_a_model_that_has_failed_once_is_waited_for() -> None:
    assert send([replica(ReplicaState.FAILED, failures=1)]).queue == "model.m1"


def test_a_model_whose_back_off_is_over_is_tried_again() -> None:
    assert send([replica(ReplicaState.FAILED, age=2)]).needs_load


@pytest.mark.parametrize(
    ("config", "served"),
    [({}, {"chat", "completion"}), ({"embeddings": True}, {"embedding"}), ({"rerank": True}, {"rerank"})],
)
def test_a_model_serves_its_own_kinds_of_request_only(config, served) -> None:
    for kind in ("chat", "completion", "embedding", "rerank"):
        if kind in served:
            assert send([], kind, **config).queue
        else:
            with pytest.raises(UnsupportedByModel, match="Chatty") as raised:
                send([], kind, **config)
            assert raised.value.param == "model"


def ready(replica_id: str, *, of: str = "m1", revision: int = 1, slots: int = 4, speed: float = 0.0) -> Replica:
    return Replica(id=replica_id, model_id=of, node_id="n", number=1, revision=revision, state=ReplicaState.READY,
                   slots=slots, speed=speed)  # fmt: skip


def share(replicas, in_flight=None, matched=None, *, waiting=0, deaf=(), turn=0, **config):
    asked = model(**config)
    load = Load(in_flight=in_flight or {}, waiting=waiting, deaf=deaf)
    return route(asked, Pool.of(asked, replicas), "chat", NOW, load=load, matched=matched, turn=turn)


AB = (ready("a"), ready("b"))


class TestSharing:
    def test_a_single_replica_needs_no_doorbell_of_its_own(self) -> None:
        way = share([ready("a")])
        assert (way.doorbell, way.replica_id) == ("model.m1", None)

    def test_the_line_stays_that_of_the_model(self) -> None:
        way = share(AB, {"a": 1})
        assert (way.queue, way.doorbell, way.replica_id) == ("model.m1", "replica.b", "b")

    def test_who_has_not_taken_what_it_was_told_of_is_not_told_again(self) -> None:
        assert {share(AB, {"b": 3}, {"a": 1.0}, deaf={"a"}, turn=turn).replica_id for turn in range(4)} == {"b"}
        assert not share(AB, {"b": 3}, {"a": 1.0}, deaf={"a"}).pressed, "no load kept it from there"
        assert share(AB, deaf={"a", "b"}).replica_id is None

    def test_what_a_deaf_one_has_to_do_is_no_measure_for_the_others(self) -> None:
        three = (*AB, ready("c"))
        assert share(three, {"b": 3, "c": 2}, {"b": 1.0}, deaf={"a"}).replica_id == "b"

    def test_replicas_on_nodes_that_do_not_report_are_told_only_if_there_are_no_others(self) -> None:
        far = replace(ready("c"), node_id="silent")
        pool = Pool.of(model(), (*AB, far), silent={"silent"})
        assert [each.id for each in pool.ready] == ["a", "b"]
        assert [each.id for each in Pool.of(model(), (far,), silent={"silent"}).ready] == ["c"]

    def test_equals_take_turns(self) -> None:
        assert [share(AB, turn=turn).replica_id for turn in range(4)] == ["a", "b", "a", "b"]

    @pytest.mark.parametrize(
        ("replicas", "in_flight", "chosen"),
        [
            (AB, {"a": 2, "b": 1}, "b"),
            ((ready("a", slots=8), ready("b", slots=2)), {"a": 2, "b": 1}, "a"),
            ((ready("a", speed=10.0), ready("b", speed=50.0)), {"b": 2}, "b"),
            ((ready("a", speed=10.0), ready("b", speed=20.0)), {"b": 3}, "a"),
            ((ready("a", speed=10.0), ready("b"), ready("c", speed=30.0)), {"c": 1}, "b"),
            ((ready("a", slots=1), ready("b", slots=9)), {"a": 1, "b": 8}, "b"),
        ],
        ids=["least in flight", "for its slots", "for its speed", "but not at any load", "unknown is usual", "free"],
    )
    def test_the_one_with_the_least_to_do_is_told(self, replicas, in_flight, chosen) -> None:
        for turn in range(3):
            assert share(replicas, in_flight, turn=turn).replica_id == chosen

    @pytest.mark.parametrize(
        ("in_flight", "waiting"), [({"a": 4, "b": 4}, 0), ({"a": 4, "b": 3}, 1), ({"a": 9, "b": 4}, 0)]
    )
    def test_without_a_free_slot_whoever_has_one_first_takes_it(self, in_flight, waiting) -> None:
        way = share(AB, in_flight, {"a": 1.0}, waiting=waiting)
        assert (way.doorbell, way.replica_id, way.pressed) == ("model.m1", None, False)

    def test_who_waits_while_there_is_room_is_on_his_way(self) -> None:
        assert share(AB, {"a": 2, "b": 2}, waiting=3).replica_id

    def test_only_replicas_of_the_current_configuration_are_told(self) -> None:
        replicas = [ready("old", revision=0), ready("a"), ready("other", of="m2"), ready("b")]
        told = {
            share(replicas, {"a": 3, "b": 3}, {"old": 1.0, "other": 1.0}, turn=turn).replica_id for turn in range(9)
        }
        assert told == {"a", "b"}

    def test_old_configurations_alone_are_as_good_as_none(self) -> None:
        assert share([ready("old", revision=0)]).needs_load


class TestAffinity:
    @pytest.mark.parametrize(
        ("in_flight", "part", "chosen", "pressed"),
        [
            ({}, 1.0, "a", False),
            ({}, 0.3, "a", False),
            ({"a": 1}, 0.29, "b", False),
            ({"a": 1}, 1.0, "a", False),
            ({"a": 2}, 1.0, "b", True),  # above 1.5 times nothing, and one
            ({"a": 3, "b": 2}, 1.0, "a", False),
            ({"a": 4, "b": 3}, 1.0, "b", True),  # no slot
        ],
    )
    def test_who_has_read_the_beginning_is_told_unless_it_is_too_busy(self, in_flight, part, chosen, pressed) -> None:
        way = share(AB, in_flight, {"a": part})
        assert (way.replica_id, way.pressed) == (chosen, pressed)

    def test_load_may_be_so_much_above_the_least(self) -> None:
        busy = (ready("a", slots=16), ready("b", slots=16))
        assert share(busy, {"a": 8, "b": 6}, {"a": 1.0}).replica_id == "a"
        assert share(busy, {"a": 9, "b": 6}, {"a": 1.0}).replica_id == "b"

    def test_the_second_best_match_is_better_than_none(self) -> None:
        three = (*AB, ready("c"))
        way = share(three, {"a": 3, "b": 1}, {"a": 1.0, "b": 0.5})
        assert (way.replica_id, way.pressed) == ("b", True)

    def test_the_larger_part_wins_over_the_smaller_load(self) -> None:
        assert share(AB, {"a": 1}, {"a": 0.9, "b": 0.5}).replica_id == "a"

    def test_of_equal_parts_the_smaller_load_wins(self) -> None:
        for turn in range(2):
            assert share(AB, {"a": 1}, {"a": 0.9, "b": 0.9}, turn=turn).replica_id == "b"

    def test_a_model_can_do_without(self) -> None:
        assert share(AB, {"a": 1}, {"a": 1.0}, route_policy="round_robin").replica_id == "b"

    def test_a_model_has_guards_of_its_own(self) -> None:
        assert share(AB, {"a": 1}, {"a": 0.2}, min_prefix_match=0.2).replica_id == "a"
        assert share(AB, {"a": 2}, {"a": 1.0}, balance_rel_threshold=3.0).replica_id == "b"
        busy = {"a": 2, "b": 1}
        assert share(AB, busy, {"a": 1.0}).replica_id == "a"
        assert share(AB, {"a": 3, "b": 1}, {"a": 1.0}, balance_rel_threshold=2.0).replica_id == "a"
        assert share(AB, {"a": 3, "b": 1}, {"a": 1.0}, balance_rel_threshold=2.0, balance_abs_threshold=1).pressed

    def test_the_clusters_guards_hold_where_a_model_has_none(self) -> None:
        asked = model()
        way = route(asked, Pool.of(asked, AB), "chat", NOW, load=Load(in_flight={"a": 1}), matched={"a": 0.5},
                    guards=Guards(min_match=0.6))  # fmt: skip
        assert way.replica_id == "b"


loads = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 6))
parts = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1))
fleets = st.lists(
    st.builds(
        ready, st.sampled_from("abcdefgh"), of=st.sampled_from(["m1", "m1", "m2"]), revision=st.integers(0, 1),
        slots=st.integers(1, 4), speed=st.sampled_from([0.0, 10.0, 90.0]),
    ), max_size=8, unique_by=lambda each: each.id,
)  # fmt: skip


@given(fleets, loads, parts, st.integers(0, 10), st.integers(0, 1000))
def test_whoever_is_told_can_take_it_and_has_a_reason(replicas, in_flight, matched, waiting, turn) -> None:
    asked = model()
    pool, load = Pool.of(asked, replicas), Load(in_flight=in_flight, waiting=waiting)
    way = route(asked, pool, "chat", NOW, load=load, matched=matched, turn=turn)
    assert way == route(asked, pool, "chat", NOW, load=load, matched=dict(reversed(matched.items())), turn=turn)
    assert way.queue == "model.m1"
    assert way.reason
    if way.replica_id is None:
        assert way.doorbell == way.queue
        assert len(pool.ready) < 2 or sum(map(load.free, pool.ready)) <= waiting
        return
    told = next(each for each in replicas if each.id == way.replica_id)
    assert way.doorbell == f"replica.{told.id}"
    assert (told.model_id, told.revision) == ("m1", 1)
    assert load.free(told) > 0
    if "read" in way.reason:
        least = min(map(load.of, pool.ready))
        assert matched[told.id] >= 0.3
        assert load.of(told) <= min(least + 2, 1.5 * least + 1)


class Looked(dict[str, int]):
    """What replicas have to do, and of which of them somebody has asked."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at: set[str] = set()

    def get(self, replica_id: str, default: int = 0) -> int:
        self.looked_at.add(replica_id)
        return default


class TestLargeFleets:
    def test_each_of_many_comes_to_be_told(self) -> None:
        many = [ready(f"r{number}") for number in range(3 * SAMPLE)]
        assert len({share(many, turn=turn).replica_id for turn in range(3 * SAMPLE)}) == len(many)

    def test_who_has_read_the_beginning_is_found_among_many(self) -> None:
        many = [ready(f"r{number}") for number in range(10 * SAMPLE)]
        assert {share(many, {}, {"r333": 1.0}, turn=turn).replica_id for turn in range(50)} == {"r333"}

    def test_a_decision_looks_at_few_however_many_there_are(self) -> None:
        asked = model()
        snapshot = Snapshot(models={"Chatty": asked}, replicas=tuple(ready(f"r{number}") for number in range(50_000)),
                            node_names={}, taken=NOW)  # fmt: skip
        assert snapshot.pool(asked) is snapshot.pool(asked), "they are put in order once"
        for turn in range(0, 2000, 99):
            load = Looked()
            route(asked, snapshot.pool(asked), "chat", NOW, load=Load(in_flight=load), matched={"r7": 0.5}, turn=turn)
            assert 1 < len(load.looked_at) <= SAMPLE + 1


@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.LOADING, ReplicaState.FAILED])
def test_a_replica_of_an_old_revision_counts_for_nothing(state: ReplicaState) -> None:
    changed = model().model_copy(update={"revision": 2})
    assert route(changed, Pool.of(changed, [replica(state)]), "chat", NOW).needs_load
