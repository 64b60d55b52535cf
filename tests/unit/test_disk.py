"""What of a node's disk models may take, and what of their files goes when nobody needs it."""

from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.disk import AGAIN, Blob, is_due, spare, surplus, unnamed
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.states import JobState

GIB = 1 << 30
A, B, C = "a" * 64, "b" * 64, "c" * 64


def blob(sha256: str, size: int, age: float) -> Blob:
    return Blob(sha256=sha256, size=size, age=age)


def test_what_stays_free() -> None:
    assert spare(100) == GIB
    assert spare(100 * GIB) == 5 * GIB
    assert spare(100 * GIB, 7) == 5 * GIB
    assert spare(100, 7) == 7


def test_the_oldest_go_first_and_the_young_stay_while_there_is_room() -> None:
    old, older, young = blob(A, 10, 700), blob(B, 10, 800), blob(C, 10, 5)
    assert surplus([young, old, older], grace=600, free=100, floor=50) == [older, old]
    assert surplus([young], grace=600, free=100, floor=50) == []


def test_the_young_go_as_far_as_the_floor_needs_it() -> None:
    blobs = [blob(A, 30, 110), blob(B, 30, 120), blob(C, 30, 130)]
    assert [found.sha256 for found in surplus(blobs, grace=600, free=0, floor=50)] == [C, B]
    assert surplus([blob(A, 30, 59)], grace=600, free=0, floor=50) == [], "its model may not know yet that it is here"
    assert surplus([blob(A, 30, 59)], grace=50, free=0, floor=50)


@given(st.lists(st.builds(blob, st.text(alphabet="0123456789abcdef", min_size=64, max_size=64),
                          st.integers(0, 100), st.floats(0, 1000)), max_size=8),
       st.integers(0, 300), st.integers(0, 300))  # fmt: skip
def test_what_is_past_its_time_goes_and_no_young_one_more_than_needed(blobs: list[Blob], free: int, floor: int) -> None:
    going = surplus(blobs, grace=500, free=free, floor=floor)
    assert {found.sha256 for found in blobs if found.age >= 500} <= {found.sha256 for found in going}
    young = [found for found in going if found.age < 500]
    if young:
        assert free + sum(found.size for found in going[:-1]) < floor


def test_what_no_model_names() -> None:
    def model(sha256: str | None) -> Model:
        return Model(id="m", name="m", revision=1, config=ModelConfig(source="hf://o/r/m", sha256=sha256))

    assert unnamed([B, A, C], [model(A), model(None)]) == [B, C]
    assert unnamed([], [model(A)]) == []


def job(state: JobState, ended: float | None = 1000.0, **result: object) -> Job:
    return Job(id="j", kind="clean_models", state=state, line="node.n.jobs", ended=ended, result=dict(result))


def test_when_a_node_is_cleaned() -> None:
    def due(files: list[str], last: Job | None, after: float = 1.0) -> bool:
        return is_due(files, last, grace=600.0, now=1000.0 + after)

    assert not due([], None)
    assert due([A], None)
    assert not due([A], job(JobState.OPEN, None))
    done = job(JobState.DONE, kept=[A], removed=[{"sha256": B, "size": 1, "age": 2.0}])
    assert not due([A, B], done)
    assert due([A, B, C], done)
    assert due([A], done, after=601)
    failed = job(JobState.FAILED)
    assert not due([A], failed)
    assert due([A], failed, after=AGAIN + 1)


def test_a_node_that_tells_nonsense_is_cleaned_again() -> None:
    for result in ({}, {"kept": 5, "removed": "x"}, {"removed": [1, {"sha256": 2}]}):
        assert is_due([A], job(JobState.DONE, **result), grace=0, now=1001.0)
