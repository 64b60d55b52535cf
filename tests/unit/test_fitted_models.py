"""A model is refused where its backend cannot serve it, and has no more slots than that has."""

import pytest

from localai_q.cluster.models import ModelConfig, fitted
from localai_q.errors import InvalidValue

ALL = ("chat", "completion", "embedding", "rerank", "tokenize")


def slots(most: int | None, **config: object) -> int:
    wanted = ModelConfig(**config)
    return fitted(wanted, capabilities=ALL, most_slots=most, given=wanted.model_fields_set).slots


def test_slots_that_nobody_chose_are_as_many_as_the_backend_has() -> None:
    assert [slots(most) for most in (None, 1, 3, 4, 9)] == [4, 1, 3, 4, 4]


def test_slots_that_somebody_chose_stay_or_are_refused() -> None:
    assert [slots(most, slots=2) for most in (None, 2, 9)] == [2, 2, 2]
    with pytest.raises(InvalidValue, match="works on 1 request") as caught:
        slots(1, slots=2)
    assert caught.value.param == "slots"


def test_nothing_else_is_changed() -> None:
    wanted = ModelConfig(context_size=99, options=("a:b",))
    found = fitted(wanted, capabilities=ALL, most_slots=1, given=())
    assert found == wanted.model_copy(update={"slots": 1})


@pytest.mark.parametrize(
    ("config", "capabilities", "fits"),
    [
        ({}, ("chat",), True),
        ({}, ("completion",), True),
        ({}, ("embedding", "rerank", "quantize"), False),
        ({"embeddings": True}, ("embedding",), True),
        ({"embeddings": True}, ("chat", "rerank"), False),
        ({"rerank": True}, ("rerank",), True),
        ({"rerank": True}, ("chat", "completion", "embedding"), False),
    ],
)
def test_a_model_is_for_what_its_backend_does(config: dict, capabilities: tuple[str, ...], fits: bool) -> None:
    wanted = ModelConfig(**config)
    if fits:
        assert fitted(wanted, capabilities=capabilities, most_slots=None, given=()) == wanted
        return
    with pytest.raises(InvalidValue, match=f"it does: {', '.join(capabilities)}") as caught:
        fitted(wanted, capabilities=capabilities, most_slots=None, given=())
    assert caught.value.param == "backend"
