"""Tickets: for one file of one holder, for minutes, and made by nobody who does not know the holder's secret."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.tickets import LIFE, is_valid, issue

KEY, OTHER_KEY = (hashlib.sha256(word).hexdigest() for word in (b"one", b"two"))
FILE, OTHER_FILE = "a" * 64, "b" * 64
NOW = 1_800_000_000.0


def test_a_ticket_holds_for_its_file_and_holder() -> None:
    ticket = issue(KEY, "n1", FILE, now=NOW)
    assert is_valid(ticket, [KEY], "n1", FILE, now=NOW)
    assert is_valid(ticket, [OTHER_KEY, KEY], "n1", FILE, now=NOW + LIFE - 1), "while its secret changes"


@pytest.mark.parametrize(
    ("keys", "node", "file", "later"),
    [
        ([KEY], "n1", OTHER_FILE, 0.0),
        ([KEY], "n2", FILE, 0.0),
        ([OTHER_KEY], "n1", FILE, 0.0),
        ([], "n1", FILE, 0.0),
        ([KEY], "n1", FILE, LIFE + 1),
        ([KEY], "n1", FILE, -2 * LIFE),
    ],
    ids=["another file", "another holder", "another secret", "no secret", "too late", "from the future"],
)
def test_a_ticket_is_refused(keys: list[str], node: str, file: str, later: float) -> None:
    assert not is_valid(issue(KEY, "n1", FILE, now=NOW), keys, node, file, now=NOW + later)


@given(st.text(max_size=200))
def test_what_nobody_signed_is_refused(ticket: str) -> None:
    assert not is_valid(ticket, [KEY], "n1", FILE, now=NOW)


# "+" and "/" are other ways to write "-" and "_".
@given(st.integers(min_value=0), st.characters(codec="ascii", exclude_characters="+/"))
def test_a_changed_ticket_is_refused(place: int, letter: str) -> None:
    ticket = issue(KEY, "n1", FILE, now=NOW)
    at = place % (len(ticket) - 1)  # the last letter has bits that mean nothing
    changed = ticket[:at] + letter + ticket[at + 1 :]
    assert changed == ticket or not is_valid(changed, [KEY], "n1", FILE, now=NOW)
