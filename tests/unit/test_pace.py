"""The pace of a replica is that of its last answers, of which a long one says more than a short one."""

import pytest

from workers.replica.pace import FADE, LEAST, Pace


def test_the_first_answer_sets_it_and_later_ones_move_it_by_their_length() -> None:
    pace = Pace()
    assert pace.tokens_per_second == 0.0
    pace.note(100, 2.0)
    assert pace.tokens_per_second == 50.0
    pace.note(LEAST, 0.4)
    assert 49.0 < pace.tokens_per_second < 50.0
    pace.note(20 * FADE, 20 * FADE / 10)
    assert pace.tokens_per_second == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(("tokens", "seconds"), [(LEAST - 1, 1.0), (0, 0.0), (100, 0.0)])
def test_what_says_nothing_changes_nothing(tokens: int, seconds: float) -> None:
    pace = Pace()
    pace.note(100, 2.0)
    pace.note(tokens, seconds)
    assert pace.tokens_per_second == 50.0
