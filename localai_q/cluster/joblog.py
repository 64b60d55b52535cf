"""What a job has said, as lines that a person reads: its log. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from localai_q.cluster.events import End, Event, Progress

MOST = 64 << 10  # bytes of a log that are kept: the last


@dataclass
class Lines:
    """Makes events into lines. Progress in numbers only is said once for each stage, when that has ended."""

    _attempt: int = field(default=1, init=False)
    _last: Progress | None = field(default=None, init=False)

    def of(self, attempt: int, event: Event) -> Iterator[str]:
        """The lines that an event adds; `attempt`: the one that has said it."""
        if attempt > self._attempt and not isinstance(event, End):
            self._attempt = attempt
            yield f"attempt {attempt}"
        if isinstance(event, Progress):
            if self._last and self._last.stage != event.stage:
                yield from _amount(self._last)
            if not self._last or (self._last.stage, self._last.note) != (event.stage, event.note):
                yield f"{event.stage}: {event.note}" if event.note else event.stage
            self._last = event
        elif isinstance(event, End):
            yield from _amount(self._last) if self._last else ()
            message = (event.error or {}).get("message")
            yield f"{event.state}: {message}" if message else str(event.state)


def text_of(events: Iterable[tuple[int, Event]]) -> str:
    """The log of a job, `MOST` bytes of it at most; `events`: each with its attempt, in their order."""
    lines, kept, size = Lines(), deque[bytes](), 0
    for attempt, event in events:
        for line in lines.of(attempt, event):
            kept.append(f"{shown(line)}\n".encode())
            size += len(kept[-1])
            while size > MOST:
                size -= len(kept.popleft())
    return b"".join(kept).decode()


def shown(line: str) -> str:
    """A line without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in line)


def _amount(last: Progress) -> Iterator[str]:
    if last.done:
        of = f" of {last.total:.0f}" if last.total else ""
        yield " ".join(filter(None, [f"{last.stage}: {last.done:.0f}{of}", last.unit]))
