"""A job's log has a line for each thing that was said, and never more than may be kept."""

from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.events import End, Event, Progress
from localai_q.cluster.joblog import MOST, text_of


def bytes_of(done: int, note: str = "") -> Progress:
    return Progress(stage="downloading", done=done, total=200, unit="bytes", note=note)


def log(*events: Event, attempt: int = 1) -> list[str]:
    return text_of([(attempt, event) for event in events]).splitlines()


def test_numbers_are_said_once_for_each_stage() -> None:
    assert log(Progress(stage="resolving"), bytes_of(50), bytes_of(100), bytes_of(200, "from n1"),
               Progress(stage="verifying"), End(state="done")) == [
        "resolving", "downloading", "downloading: from n1", "downloading: 200 of 200 bytes", "verifying", "done",
    ]  # fmt: skip


def test_a_failure_says_how_far_it_came_and_why() -> None:
    told = End(state="failed", error={"message": "no network"})
    assert log(bytes_of(50), told) == ["downloading", "downloading: 50 of 200 bytes", "failed: no network"]


def test_another_attempt_is_said() -> None:
    events = [(1, bytes_of(50)), (2, bytes_of(60)), (3, End(state="cancelled"))]
    assert text_of(events).splitlines() == ["downloading", "attempt 2", "downloading: 60 of 200 bytes", "cancelled"]


def test_a_terminal_obeys_nothing_of_it() -> None:
    (line,) = log(Progress(stage="installing", note="\x1b[2J\x00\ud800\nred"))
    assert line == "installing:  [2J   red"


@given(st.lists(st.text(max_size=300), max_size=40), st.integers(1, 400))
def test_the_last_is_kept_in_whole_lines(notes: list[str], times: int) -> None:
    said = [Progress(stage="installing", note=note) for note in notes * times]
    text = text_of((1, event) for event in [*said, End(state="done")])
    assert len(text.encode()) <= MOST
    assert text.endswith("done\n")
    assert all(line.startswith(("installing", "done")) for line in text.splitlines())
