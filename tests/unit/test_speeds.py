"""What is expected of a model on a node: its own measure, else that of its like, else nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.speeds import Measure, Speeds

GB = 10**9


def model(name: str, size: int) -> Model:
    return Model(id=name, name=name, revision=1, config=ModelConfig(backend="echo", size=size))


def measure(of: str, at: str = "n1", *, speed: float = 0.0, load: float = 0.0) -> Measure:
    return Measure(node_id=at, model_id=of, tokens_per_second=speed, load_seconds=load)


SMALL, MIDDLE, LARGE, UNKNOWN = model("s", GB), model("m", 4 * GB), model("l", 8 * GB), model("u", 0)
ALL = [SMALL, MIDDLE, LARGE, UNKNOWN]


@pytest.mark.parametrize(
    ("measures", "of", "speed", "load"),
    [
        ([], LARGE, 0, 0),
        ([measure("l", speed=5, load=3)], LARGE, 5, 3),
        ([measure("l", speed=5, load=3), measure("s", speed=100, load=1)], LARGE, 5, 3),  # its own goes first
        ([measure("s", speed=80, load=2)], LARGE, 10, 16),  # eight times the bytes
        ([measure("l", speed=10, load=16)], SMALL, 80, 2),
        ([measure("l", load=16)], LARGE, 0, 16),  # one of both
        ([measure("s", speed=80), measure("l", load=16)], LARGE, 10, 16),
        ([measure("s", speed=80), measure("m", speed=10)], LARGE, 7.5, 0),  # the middle of 80 and 40 GB/s
        ([measure("s", "n2", speed=80, load=2)], LARGE, 0, 0),  # of another node
        ([measure("u", speed=80, load=2)], LARGE, 0, 0),  # of a model whose size nobody knows
        ([measure("s", speed=80, load=2)], UNKNOWN, 0, 0),
        ([measure("u", speed=80, load=2)], UNKNOWN, 80, 2),
        ([measure("removed", speed=80, load=2)], LARGE, 0, 0),
    ],
)
def test_what_is_expected(measures: list[Measure], of: Model, speed: float, load: float) -> None:
    speeds = Speeds(measures, ALL)
    assert speeds.tokens_per_second(of, "n1") == pytest.approx(speed)
    assert speeds.load_seconds(of, "n1") == pytest.approx(load)


@given(st.lists(st.tuples(st.sampled_from("sml"), st.floats(0, 1e6), st.floats(0, 1e6))))
def test_a_larger_model_is_never_expected_to_be_faster(found: list[tuple[str, float, float]]) -> None:
    speeds = Speeds([measure(of, speed=speed, load=load) for of, speed, load in found], ALL)
    larger, smaller = model("new", 3 * GB), model("new2", 2 * GB)
    assert 0 <= speeds.tokens_per_second(larger, "n1") <= speeds.tokens_per_second(smaller, "n1")
    assert speeds.load_seconds(larger, "n1") >= speeds.load_seconds(smaller, "n1") >= 0
