"""A generation goes on from what was shown of it, or says why it cannot."""

import pytest

from localai_q.cluster.events import Delta, Finish, Progress
from localai_q.cluster.recovery import Said, continued, exhausted, said_so_far
from localai_q.errors import GenerationFailed

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def test_what_was_said_is_counted_choice_by_choice() -> None:
    events = [Delta(text="a", tokens=1), Delta(text="b", tokens=2), Finish(), Delta(choice=1, text="c", tokens=1)]
    assert said_so_far(events) == {0: Said(text="ab", tokens=3, finished=True), 1: Said(text="c", tokens=1)}


def test_what_is_no_piece_of_an_answer_does_not_count() -> None:
    assert said_so_far([Progress(stage="x")]) == {}


def test_a_chat_goes_on_as_an_answer_of_the_assistant_with_what_is_left_of_its_tokens() -> None:
    body = continued("chat", {**CHAT, "max_tokens": 10}, Said(text="Hello", tokens=3))
    assert body["messages"] == [*CHAT["messages"], {"role": "assistant", "content": "Hello"}]
    assert (body["max_tokens"], body["temperature"]) == (7, 0)


def test_the_body_that_is_continued_stays_as_it_was() -> None:
    before = {**CHAT, "messages": list(CHAT["messages"])}
    continued("chat", before, Said(text="x", tokens=1))
    assert before == CHAT


def test_a_completion_goes_on_behind_its_prompt() -> None:
    assert continued("completion", {"prompt": "Once"}, Said(text=" upon", tokens=1)) == {"prompt": "Once upon"}


@pytest.mark.parametrize(("most", "tokens", "out"), [(3, 2, False), (3, 3, True), (3, 4, True), (None, 99, False)])
def test_an_answer_is_exhausted_when_it_had_its_tokens(most: int | None, tokens: int, out: bool) -> None:
    assert exhausted({"max_tokens": most}, Said(tokens=tokens)) is out


@pytest.mark.parametrize(
    ("kind", "body", "said", "why"),
    [
        ("chat", CHAT, Said(text="x", more_than_text=True), "reasoning or tool calls"),
        ("chat", {**CHAT, "grammar": "root ::= x"}, Said(text="x"), "grammar"),
        ("chat", {**CHAT, "response_format": {"type": "json_object"}}, Said(text="x"), "grammar"),
        ("chat", {**CHAT, "tools": [{}]}, Said(text="x"), "tools"),
        ("chat", {"messages": [{"role": "assistant", "content": "y"}]}, Said(text="x"), "continued an answer already"),
        ("completion", {"prompt": [1, 2]}, Said(text="x"), "list of tokens"),
    ],
)
def test_what_cannot_be_continued_says_why(kind: str, body: dict, said: Said, why: str) -> None:
    with pytest.raises(GenerationFailed, match=why):
        continued(kind, body, said)


def test_plain_text_as_the_response_format_is_no_obstacle() -> None:
    assert (
        continued("chat", {**CHAT, "response_format": {"type": "text"}}, Said(text="x"))["messages"][-1]["content"]
        == "x"
    )
