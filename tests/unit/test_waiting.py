"""What those who wait are told."""

from dataclasses import replace

import pytest

from localai_q.cluster.events import Progress
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Replica
from localai_q.cluster.speeds import Measure, Speeds
from localai_q.cluster.states import ReplicaState
from localai_q.cluster.waiting import Failure, Load, Standing, expected_wait, failure_of, load_of

NAMES = {"n1": "alpha", "n2": "beta"}
MODEL = Model(id="m", name="m", revision=1, config=ModelConfig(backend="echo", size=1000))
OTHER = Model(id="o", name="o", revision=1, config=ModelConfig(backend="echo", size=500))
KNOWN = Speeds([Measure(node_id="n1", model_id="m", load_seconds=20.0), Measure(node_id="n2", model_id="o", load_seconds=4.0)],
               [MODEL, OTHER])  # fmt: skip


def replica(state: ReplicaState, node_id: str = "n1", job_id: str | None = None) -> Replica:
    return Replica(id=f"r-{node_id}", model_id="m", node_id=node_id, number=1, revision=1, state=state, slots=2,
                   job_id=job_id, changed=100.0)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "slots", "pace", "wait"),
    [(1, 4, 10.0, 10.0), (4, 4, 10.0, 10.0), (5, 4, 10.0, 20.0), (1, 0, 10.0, None), (1, 4, None, None)],
)
def test_the_expected_wait_counts_rounds(place: int, slots: int, pace: float | None, wait: float | None) -> None:
    assert expected_wait(place, slots, pace) == wait


def test_the_load_that_is_furthest_is_told_with_its_progress() -> None:
    own = [replica(ReplicaState.PLACED), replica(ReplicaState.STAGING, "n2", "j2")]
    progress = {"j2": Progress(stage="downloading", done=25.0, total=100.0, unit="bytes")}
    load = load_of(MODEL, own, NAMES, progress, Speeds(), now=110.0)
    assert load is not None
    assert load.body() == {"model": "m", "state": "staging", "node": "beta", "progress": 25.0, "bytes_sent": 25,
                           "total_bytes": 100, "eta_seconds": 30, "ready_in_seconds": None, "since": 100.0,
                           "attempt": 1}  # fmt: skip
    assert str(Standing(place=2, load=load)) == ("waiting: m is staging on beta, 25 % downloading, about 30 s left")


def test_a_load_without_progress_has_its_state_only() -> None:
    load = load_of(MODEL, [replica(ReplicaState.PLACED)], NAMES, {}, KNOWN, now=110.0)
    assert load == Load(model="m", state="placed", node="alpha", since=100.0)
    assert load.body()["state"] == "pending"
    assert load.body()["eta_seconds"] is None
    assert str(load) == "m is placed on alpha"


@pytest.mark.parametrize(
    ("at", "now", "left"),
    [("n1", 105.0, 15), ("n1", 130.0, 0), ("n1", 90.0, 20), ("n2", 105.0, 3), ("n3", 105.0, None)],
)
def test_loading_takes_as_long_as_it_took_or_as_its_like_took_by_their_bytes(at: str, now: float, left: int) -> None:
    load = load_of(MODEL, [replica(ReplicaState.LOADING, at, "ended")], NAMES, {}, KNOWN, now=now)
    assert load is not None
    assert (load.body()["eta_seconds"], load.body()["ready_in_seconds"]) == (left, left)
    assert ("s left" in str(load)) is (left is not None)
    assert "ready in" not in str(load)


def test_the_whole_takes_the_stage_and_the_loading_after_it() -> None:
    progress = {"j": Progress(stage="downloading", done=25.0, total=100.0, unit="bytes")}
    load = load_of(MODEL, [replica(ReplicaState.STAGING, job_id="j")], NAMES, progress, KNOWN, now=110.0)
    assert load is not None
    assert (load.body()["eta_seconds"], load.body()["ready_in_seconds"]) == (30, 50)
    assert str(load) == "m is staging on alpha, 25 % downloading, about 30 s left, ready in about 50 s"


def test_packages_are_no_bytes() -> None:
    progress = {"j": Progress(stage="installing", done=3.0, total=4.0, unit="packages")}
    load = load_of(MODEL, [replica(ReplicaState.INSTALLING, job_id="j")], NAMES, progress, KNOWN, now=100.0)
    assert load is not None
    assert (load.body()["bytes_sent"], load.body()["progress"]) == (0, 75.0)


@pytest.mark.parametrize(
    "own", [[], [replica(ReplicaState.FAILED)], [replica(ReplicaState.READY), replica(ReplicaState.LOADING, "n2")]]
)
def test_where_nothing_must_be_waited_for_there_is_no_load(own: list[Replica]) -> None:
    assert load_of(MODEL, own, NAMES, {}, KNOWN, now=1.0) is None


def test_a_place_is_told_with_the_time_where_that_is_known() -> None:
    assert str(Standing(place=3)) == "waiting: place 3"
    assert str(Standing(place=3, seconds=11.2)) == "waiting: place 3, about 12 s"


FAILED = replace(replica(ReplicaState.FAILED), failures=3, reason="no memory")
AGAIN = replace(replica(ReplicaState.STAGING, "n2"), failures=1, reason="no network", changed=200.0)


@pytest.mark.parametrize(
    ("own", "failure"),
    [
        ([], None),
        ([replica(ReplicaState.STAGING)], None),
        ([FAILED, replica(ReplicaState.READY, "n2")], None),
        ([FAILED], Failure(node="alpha", reason="no memory", attempts=3, retry_at=104.0)),
        ([AGAIN], Failure(node="beta", reason="no network", attempts=1, retry_at=None)),
        ([AGAIN, FAILED], Failure(node="alpha", reason="no memory", attempts=3, retry_at=104.0)),
    ],
)
def test_the_last_failure_is_told_until_the_model_is_loaded(own: list[Replica], failure: Failure | None) -> None:
    assert failure_of(own, NAMES) == failure


def test_a_load_after_a_failure_is_another_attempt() -> None:
    load = load_of(MODEL, [AGAIN], NAMES, {}, Speeds(), now=201.0)
    assert load is not None
    assert (load.body()["attempt"], load.body()["since"]) == (2, 200.0)
