"""Every error says what went wrong, with which status, and survives being stored with a job."""

import pytest

from localai_q.errors import GenerationFailed, LocalAIError, all_errors, from_record, to_record

ERRORS = sorted(all_errors().values(), key=lambda kind: kind.__name__)
TYPES = {"server_error", "invalid_request_error", "permission_error", "rate_limit_error", "service_unavailable",
         "timeout", "model_loading"}  # fmt: skip


def test_the_tree_is_not_empty_and_names_are_unique() -> None:
    def walk(root):
        yield root
        for child in root.__subclasses__():
            yield from walk(child)

    found = list(walk(LocalAIError))
    assert len(found) > 20
    assert len({kind.__name__ for kind in found}) == len(found) == len(ERRORS)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_explained_and_has_a_status_and_a_type(kind) -> None:
    assert "__doc__" in vars(kind)
    assert kind.__doc__.strip().endswith(".")
    assert 400 <= kind.status < 600
    assert kind.type in TYPES
    assert kind is LocalAIError or kind.code is None or kind.code == kind.code.lower()
    client_error = kind.type in ("invalid_request_error", "permission_error", "rate_limit_error")
    assert client_error == (400 <= kind.status < 499)


@pytest.mark.parametrize("kind", ERRORS)
def test_without_a_message_an_error_says_its_docstring(kind) -> None:
    assert kind().message == str(kind()) == kind.__doc__.strip()


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_the_same_after_being_stored(kind) -> None:
    back = from_record(to_record(kind("what happened", param="messages.0")))
    assert type(back) is kind
    assert (back.message, back.param) == ("what happened", "messages.0")
    assert back.body() == kind("what happened", param="messages.0").body()


def test_the_body_is_the_one_of_openai() -> None:
    body = GenerationFailed("it broke", param="p").body()
    assert body == {"error": {"message": "it broke", "type": "server_error", "param": "p", "code": "backend_failed"}}


@pytest.mark.parametrize("record", [{"error": "OfANewerVersion", "message": "why"}, {"message": "why"}])
def test_a_stored_error_of_an_unknown_kind_keeps_its_message(record) -> None:
    back = from_record(record)
    assert type(back) is GenerationFailed
    assert back.message == "why"


def test_an_empty_record_is_still_an_error_with_a_message() -> None:
    assert from_record({}).message == GenerationFailed.__doc__
