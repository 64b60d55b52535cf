"""Wishes that cannot be met, and how long nobody looks again whether they can. Pure.

A model that should have more replicas than there is room for rests: it is not looked for a place again until its rest is
over, which grows from one to the next, or until something has changed that could make room. `circumstances` sums up what
could.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from pydantic import BaseModel, ConfigDict

REST_FIRST = 5.0  # seconds
REST_MOST = 300.0
KEPT = 300.0  # seconds that a wish which nobody repeats can still be seen, and its next rest is longer
STEP = 64 << 20  # bytes by which a node's free memory or disk must change to count: it always changes by a little


class Unmet(BaseModel):
    """A wish for replicas that the cluster cannot meet."""

    model_config = ConfigDict(frozen=True)

    revision: int  # of the model
    wanted: int  # replicas
    has: int
    since: float  # seconds since the epoch, like `until`
    reason: str
    nodes: dict[str, str]  # why not there, of some nodes by name
    hopeless: bool  # there is no room even if all that may make room did
    until: float  # end of its rest
    rest: float  # seconds
    seen: str  # the circumstances in which it was found so

    def rests(self, wanted: int, has: int, seen: str, now: float) -> bool:
        """Whether it is not worth looking again for this wish."""
        return (wanted, has, seen) == (self.wanted, self.has, self.seen) and now < self.until

    def shown(self) -> dict[str, Any]:
        """What people are told of it."""
        return self.model_dump(include={"wanted", "has", "since", "reason", "nodes"})


def unmet(before: Unmet | None, now: float, **found: Any) -> Unmet:
    """The wish after somebody has looked once more in vain; `before`: as it was known until then."""
    rest = REST_FIRST if before is None else before.rest
    if before and now >= before.until:
        rest = min(2 * rest, REST_MOST)
    return Unmet(since=before.since if before else now, until=now + rest, rest=rest, **found)


def is_over(wish: Unmet, revision: int, has: int, now: float) -> bool:
    """Whether the wish of a model that lacks nothing is to be forgotten: it was met or changed, or long not repeated."""
    return has >= wish.wanted or revision != wish.revision or now >= wish.until + KEPT


def circumstances(facts: Iterable[Any]) -> str:
    """All of these in a few letters, the same in every process."""
    return blake2b(repr(list(facts)).encode(), digest_size=12).hexdigest()
