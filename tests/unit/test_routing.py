"""Which line a request joins, and who is told at once that the model cannot be had."""

import pytest

from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Replica
from localai_q.cluster.routing import route
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.errors import ModelUnavailable, UnsupportedByModel

NOW = 5_000.0


def model(**config) -> Model:
    return Model(id="m1", name="Chatty", revision=1, config=ModelConfig(backend="echo", **config))


def replica(state: ReplicaState, *, of: str = "m1", age: float = 0.0, reason: str = "", failures: int = 2) -> Replica:
    return Replica(id=f"{of}{state}", model_id=of, node_id="n", number=1, revision=1, state=state, slots=1,
                   failures=failures, changed=NOW - age, reason=reason)  # fmt: skip


def test_a_request_always_joins_the_line_of_its_model() -> None:
    for replicas in ([], [replica(ReplicaState.READY)], [replica(ReplicaState.LOADING)]):
        assert route(model(), replicas, "chat", NOW).queue == "model.m1"


def test_a_ready_replica_serves_whatever_the_others_do() -> None:
    way = route(model(), [replica(ReplicaState.FAILED), replica(ReplicaState.READY)], "chat", NOW)
    assert not way.needs_load
    assert "1" in way.reason


@pytest.mark.parametrize("state", COMING_UP)
def test_what_is_coming_up_needs_no_second_load(state) -> None:
    assert not route(model(), [replica(state)], "chat", NOW).needs_load


@pytest.mark.parametrize("state", [ReplicaState.STOPPING, ReplicaState.GONE])
def test_what_is_on_its_way_out_serves_nobody(state) -> None:
    assert route(model(), [replica(state)], "chat", NOW).needs_load


def test_replicas_of_other_models_do_not_count() -> None:
    assert route(model(), [replica(ReplicaState.READY, of="m2")], "chat", NOW).needs_load


def test_a_model_that_has_failed_twice_in_a_row_is_refused_with_the_reason() -> None:
    failed = replica(ReplicaState.FAILED, reason="no room on the card", failures=2)
    with pytest.raises(ModelUnavailable, match=r"Chatty.*no room on the card"):
        route(model(), [failed], "chat", NOW)


def test_a_model_that_has_failed_once_is_waited_for() -> None:
    assert route(model(), [replica(ReplicaState.FAILED, failures=1)], "chat", NOW).queue == "model.m1"


def test_a_model_whose_back_off_is_over_is_tried_again() -> None:
    assert route(model(), [replica(ReplicaState.FAILED, age=2)], "chat", NOW).needs_load


@pytest.mark.parametrize(
    ("config", "served"),
    [({}, {"chat", "completion"}), ({"embeddings": True}, {"embedding"}), ({"rerank": True}, {"rerank"})],
)
def test_a_model_serves_its_own_kinds_of_request_only(config, served) -> None:
    for kind in ("chat", "completion", "embedding", "rerank"):
        if kind in served:
            assert route(model(**config), [], kind, NOW).queue
        else:
            with pytest.raises(UnsupportedByModel, match="Chatty") as raised:
                route(model(**config), [], kind, NOW)
            assert raised.value.param == "model"
