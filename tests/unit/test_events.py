"""Events survive their journal, and pieces that are joined lose nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.events import ENDS, LARGEST, Delta, End, Finish, Progress, Usage, Vector, decode, encode

text = st.text(max_size=20)
count = st.integers(0, 2**40)
number = st.floats(allow_nan=False, allow_infinity=False)
amount = st.floats(0, LARGEST) | st.integers(0, int(LARGEST))
item = st.dictionaries(text, st.none() | st.booleans() | count | text, max_size=3)
items = st.lists(item, max_size=3).map(tuple)
deltas = st.builds(
    Delta, choice=st.integers(0, 3), text=text, reasoning=text, tool_calls=items, logprobs=items, tokens=count
)
events = st.one_of(
    deltas,
    st.builds(Finish, choice=st.integers(0, 99), reason=text),
    st.builds(Vector, index=count, values=st.lists(number, max_size=5).map(tuple)),
    st.builds(Progress, stage=text, done=amount, total=amount, unit=text, note=text),
    st.builds(
        End,
        state=st.sampled_from(ENDS),
        usage=st.builds(Usage, prompt=count, completion=count, cached=count),
        timings=st.dictionaries(text, amount, max_size=3),
        error=st.none() | item,
        result=st.none() | item,
    ),
)


@given(events)
def test_an_event_is_the_same_after_encoding_and_decoding(event):
    assert decode(encode(event)) == event
    assert decode(encode(event).encode()) == event


@given(events)
def test_an_encoded_event_is_one_line(event):
    assert "\n" not in encode(event)
    assert "\r" not in encode(event)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1e19", "-1", '"7"', "null", "[1]", "1" * 400]
)
def test_what_is_no_amount_is_none(number: str) -> None:
    told = decode(f'{{"k":"p","s":1,"d":{number},"t":{number},"u":"bytes","n":[]}}')
    assert told == Progress(stage="1", done=0.0, total=0.0, unit="bytes", note="[]")
    ended = decode(f'{{"k":"e","s":"done","u":[0,0,0],"t":{{"total":{number}}},"x":null,"r":null}}')
    assert ended == End(state="done", timings={"total": 0.0})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", '{"k":"p"}', '{"k":"f"}', '{"k":"e","s":"open","u":[0,0,0],"t":{},"x":null,"r":null}',
     '{"k":"e","s":"done","u":[],"t":{},"x":null,"r":null}', '{"k":"e","s":"done","u":[0,0,0],"t":{},"x":"no","r":null}',
     '{"k":"e","s":"done","u":[0,0,0],"t":[],"x":null,"r":null}', '{"k":"v","i":0,"v":1}', '{"k":"p","s":' + "[" * 100_000],
)  # fmt: skip
def test_what_is_no_event_is_refused_in_one_way(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)


def test_a_marker_carries_no_event():
    assert decode('{"k":"m","a":2}') is None


@given(st.lists(deltas, max_size=12))
def test_joining_neighbours_loses_no_text_no_token_and_no_order(pieces):
    joined: list[Delta] = []
    for piece in pieces:
        if joined and joined[-1].joins(piece):
            joined[-1] = joined[-1].join(piece)
        else:
            joined.append(piece)
    for choice in range(4):
        before = [piece for piece in pieces if piece.choice == choice]
        after = [piece for piece in joined if piece.choice == choice]
        for name in ("text", "reasoning"):
            assert "".join(getattr(p, name) for p in before) == "".join(getattr(p, name) for p in after)
        for name in ("tool_calls", "logprobs"):
            assert [x for p in before for x in getattr(p, name)] == [x for p in after for x in getattr(p, name)]
        assert sum(piece.tokens for piece in before) == sum(piece.tokens for piece in after)


@given(deltas, deltas)
def test_pieces_of_two_choices_are_never_joined(one, other):
    assert not one.joins(other) or one.choice == other.choice


@given(*[st.builds(Usage, prompt=count, completion=count, cached=count)] * 2)
def test_usages_add_up(one, other):
    both = one + other
    assert (both.prompt, both.completion) == (one.prompt + other.prompt, one.completion + other.completion)
    assert both.cached == one.cached + other.cached
