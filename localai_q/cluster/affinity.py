"""Which replica has read the beginning of a prompt, so that its engine need not read it again. Pure.

The head of a prompt is cut into windows, and each window gets a keyed hash that covers those before it: a link stands for
one whole beginning, so a table of links is a radix tree whose nodes need no pointers. `localai_q.services.router` keeps
a table in each web process and tells the others what it has seen.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from localai_q.cluster.requests import GenerationRequest

WINDOW = 256  # bytes
MOST_WINDOWS = 64
HEAD = WINDOW * MOST_WINDOWS  # bytes of a prompt that are looked at
LINK = 8  # bytes of a hash
MOST_SIGHTINGS = 4  # replicas that one link remembers
NEWS = 0.25  # part of its life after which a sighting that is seen again is worth telling others

Chain = tuple[bytes, ...]  # one link for each whole window of a prompt's head


def chain_of(text: bytes, *, key: bytes, model_id: str) -> Chain:
    """The links of a text for this model. What does not fill a window is left out, for it changes with the next turn.

    Args:
        key: a secret of the cluster, so that nobody else can tell from a link what a prompt was; 64 bytes at most.
    """
    link, links = model_id.encode(), []
    for start in range(0, min(len(text), HEAD) - WINDOW + 1, WINDOW):
        link = blake2b(link + text[start : start + WINDOW], key=key, digest_size=LINK).digest()
        links.append(link)
    return tuple(links)


def head_of(request: GenerationRequest) -> bytes:
    """The beginning of what the model is to read, in the order of chat templates: tools, then the messages.

    Empty for what leaves nothing of use in a cache, such as an embedding.
    """
    pieces, left = [], HEAD
    for text in _texts(request):
        piece = text[:left].encode(errors="replace")[:left]
        pieces.append(piece)
        left -= len(piece)
        if left <= 0:
            break
    return b"".join(pieces)


def _texts(request: GenerationRequest) -> Iterator[str]:
    if request.kind == "completion":
        yield _text(request.inputs[0])
    elif request.kind == "chat":
        yield _text(request.body.get("tools") or "")
        for message in request.body.get("messages", ()):
            for name in sorted(message, key=lambda name: (name != "role", name)):
                yield f"\x1e{name}\x1f"
                yield _text(message[name])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(slots=True, eq=False)
class _Holder:
    """A replica, shared by all its sightings: it is forgotten in one place."""

    replica_id: str
    there: bool = True


class Prefixes:
    """A bounded table of who has seen which beginnings.

    Args:
        ttl: seconds for which a sighting counts.
        most: links that are kept, which take some 350 bytes each; those go first that were seen longest ago.
    """

    def __init__(self, *, ttl: float, most: int) -> None:
        self._ttl = ttl
        self._most = most
        self._entries: OrderedDict[bytes, tuple[tuple[_Holder, float], ...]] = OrderedDict()
        self._holders: dict[str, _Holder] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def holders(self) -> set[str]:
        """The replicas of which something was seen."""
        return set(self._holders)

    def observe(self, chain: Chain, replica_id: str, now: float) -> bool:
        """The replica reads this beginning. Whether that is news for who shares the table."""
        if not chain:
            return False
        holder = self._holders.setdefault(replica_id, _Holder(replica_id))
        news = self._is_news(chain[-1], holder, now)
        sighting = (holder, now)
        for link in chain:
            others = [each for each in self._entries.get(link, ()) if each[0] is not holder and self._counts(each, now)]
            self._entries[link] = (sighting, *others[: MOST_SIGHTINGS - 1])
            self._entries.move_to_end(link)
        self._shrink(now)
        return news

    def match(self, chain: Chain, now: float) -> dict[str, float]:
        """How much of this beginning each replica has read, from 0 to 1; those that read none of it are left out."""
        found: dict[str, float] = {}
        for depth in range(len(chain), 0, -1):
            for sighting in self._entries.get(chain[depth - 1], ()):
                if self._counts(sighting, now):
                    found.setdefault(sighting[0].replica_id, depth / len(chain))
        return found

    def forget(self, replica_id: str) -> None:
        """The replica has gone, and what it had read with it."""
        holder = self._holders.pop(replica_id, None)
        if holder:
            holder.there = False

    def _is_news(self, link: bytes, holder: _Holder, now: float) -> bool:
        seen = next((at for other, at in self._entries.get(link, ()) if other is holder), None)
        return seen is None or now - seen > NEWS * self._ttl

    def _counts(self, sighting: tuple[_Holder, float], now: float) -> bool:
        return sighting[0].there and now - sighting[1] < self._ttl

    def _shrink(self, now: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if len(self._entries) <= self._most and now - oldest[0][1] < self._ttl:
                return
            self._entries.popitem(last=False)
