"""All that Redis holds as a plain value: read out, put back, compared. Owns what of it counts as the same.

Times are left out of the value: of a lease only whether it is alive is kept, of a place in the line only that it is
held. Expiries of keys are left out too. So two values are equal exactly if the scripts cannot tell them apart, and what
a script makes of one has to be asked of Redis only once.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import redis

from localai_q.bus.leases import Lease, Leases

ALIVE, EXPIRED, HELD = "alive", "expired", "held"
SCORES = {ALIVE: 1 << 43, EXPIRED: 1, HELD: 1}  # milliseconds since the epoch: the year 2248, and 1970
TIMES = ("claimed", "left")

Content = tuple[tuple[str, str, tuple[str, ...]], ...]  # (key, type, its values in a fixed order) of each key

READ = """
local read = {
  hash = function(key) return redis.call('HGETALL', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  string = function(key) return {redis.call('GET', key)} end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key)
    local flat = {}
    for _, row in ipairs(redis.call('XRANGE', key, '-', '+')) do
      flat[#flat + 1] = row[1]
      flat[#flat + 1] = row[2][2]
    end
    return flat
  end,
}
local t, found = redis.call('TIME'), {}
for i, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  found[i] = {key, kind, read[kind](key)}
end
return {t[1] * 1000 + math.floor(t[2] / 1000), cjson.encode(found)}
"""

WRITE = """
for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('DEL', key) end
for _, item in ipairs(cjson.decode(ARGV[1])) do
  local key, kind, values = item[1], item[2], item[3]
  if kind == 'hash' then redis.call('HSET', key, unpack(values))
  elseif kind == 'set' then redis.call('SADD', key, unpack(values))
  elseif kind == 'string' then redis.call('SET', key, values[1])
  elseif kind == 'zset' then
    for i = 1, #values, 2 do redis.call('ZADD', key, values[i + 1], values[i]) end
  else
    for i = 1, #values, 2 do redis.call('XADD', key, values[i], 'e', values[i + 1]) end
  end
end
"""


class Stored:
    """Contents that were met, each under a number, and what calls make of them. The client's database is its own."""

    def __init__(self, client: redis.Redis, leases: Leases) -> None:
        self.leases = leases
        self.contents: list[Content] = []
        self.asked = 0  # calls that Redis was really asked
        self._read = client.register_script(READ)
        self._write = client.register_script(WRITE)
        self._numbers: dict[Content, int] = {}
        self._now = -1  # the number of what Redis holds now
        self._answers: dict[tuple[object, ...], tuple[int, Any]] = {}
        self._claimed: list[Lease] = []

    def number(self, content: Content) -> int:
        if content not in self._numbers:
            self._numbers[content] = len(self.contents)
            self.contents.append(content)
        return self._numbers[content]

    def edit(self, number: int, change: Callable[[Content], Content]) -> int:
        """What a fault makes of this content, without a script."""
        return self.number(change(self.contents[number]))

    def call(self, number: int, what: str, deed: Callable[..., Any], *args: object) -> tuple[int, Any]:
        """Do it to this content: what Redis holds then, and the answer. `what` and `args` name the deed."""
        key = (number, what, *args)
        if key not in self._answers:
            self._answers[key] = self._ask(number, deed, *args)
        return self._answers[key]

    def lease(self, number: int) -> Lease:
        return self._claimed[number]

    def number_of(self, lease: Lease) -> int:
        """A number for this lease, whose times count for nothing."""
        lease = replace(lease, fields={name: text for name, text in lease.fields.items() if name not in TIMES})
        if lease not in self._claimed:
            self._claimed.append(lease)
        return self._claimed.index(lease)

    def _ask(self, number: int, deed: Callable[..., Any], *args: object) -> tuple[int, Any]:
        self.asked += 1
        if number != self._now:
            self._write(args=[_as_json(self.contents[number])])
        self._now = -1
        answer = deed(*args)
        now, text = self._read()
        self._now = self.number(tuple(sorted(_canonical(*item, now) for item in json.loads(text))))
        return self._now, answer


def _canonical(key: str, kind: str, values: list[str], now: int) -> tuple[str, str, tuple[str, ...]]:
    pairs = list(zip(values[::2], values[1::2], strict=False))
    if kind == "hash":
        values = [each for name, value in sorted(pairs) if name not in TIMES for each in (name, value)]
    elif kind == "zset":
        values = [each for name, score in pairs for each in (name, _standing(key, float(score), now))]
    elif kind == "set":
        values = sorted(values)
    return key, kind, tuple(values)


def _standing(key: str, score: float, now: int) -> str:
    if not key.startswith("leases:"):
        return HELD
    return ALIVE if score > now else EXPIRED


def _as_json(content: Content) -> str:
    return json.dumps([
        (key, kind, [SCORES.get(value, value) for value in values] if kind == "zset" else values)
        for key, kind, values in content
    ])  # fmt: skip
