"""The scripts of a job's road, tried in every order that a small world allows: nothing is lost or doubled, and each fence
is needed for that."""

from collections.abc import Iterator
from importlib import resources

import pytest
import redis
from exploration import Budget, Exploration, Explored, World

from localai_q.bus.leases import Leases
from localai_q.embedded.valkey import Valkey

LEAST = 500  # states of a world that is worth the name

# Faults multiply each other's states, so each world has those that can meet in one script.
WORLDS = {
    "pauses and a death": World(Budget(pauses=2, crashes=1)),
    "two deaths, after the second of which nobody tries again": World(Budget(crashes=2, pauses=1)),
    "a doorbell too many": World(Budget(pauses=1, crashes=1, doubles=1)),
    "two threads of one process": World(Budget(pauses=2, doubles=1), owners=("A", "A", "B")),
    "a longer answer": World(Budget(pauses=2, losses=1), whole="abc"),
    "somebody aborts": World(Budget(pauses=1, crashes=1, aborts=1)),
    "the deadline passes": World(Budget(pauses=1, aborts=1, forced=1, losses=1)),
    "writes come twice and late": World(Budget(pauses=1, losses=1, delays=1, aborts=1)),
    "a job is given back": World(Budget(pauses=1, releases=1, delays=1)),
    "Redis loses the journal": World(Budget(pauses=1, holes=1), whole="abc"),
    "Redis loses everything": World(Budget(wipes=1, crashes=1)),
    "Redis loses everything while somebody sleeps": World(Budget(pauses=1, wipes=1), whole="abc"),
    "Redis loses everything and is sent something late": World(Budget(wipes=1, losses=1, delays=1)),
    "Redis loses everything and somebody aborts": World(Budget(wipes=1, aborts=1, losses=1)),
    "Redis loses the latest": World(Budget(pauses=1, failovers=1), client=False),
    "Redis forgets what is over": World(Budget(pauses=1, losses=1, expiries=1)),
    "the model was changed": World(
        Budget(pauses=1, crashes=1, doubles=1, releases=1), owners=("A", "B", "C"), outdated=("A",)
    ),
    "the model was changed and Redis loses everything": World(Budget(wipes=1, crashes=1), outdated=("A",)),
}

# The one thing that is not told apart: a fail-over to a replica that lagged, after which a claim gets the number of one
# that was lost. docs/protocol.md says so.
SPLICED = World(Budget(pauses=1, failovers=1))

PAUSE = World(Budget(pauses=1))
THREADS = World(Budget(pauses=1), owners=("A", "A"))
LATE = World(Budget(pauses=1, losses=1, delays=1, releases=1))
ABORT = World(Budget(pauses=1, aborts=1))
FORCED = World(Budget(forced=1))
DEATH = World(Budget(crashes=1, doubles=1))
HOLE = World(Budget(pauses=1, holes=1), client=False)
HOLE_AND_THREADS = World(Budget(pauses=1, holes=1), owners=("A", "A"), client=False)
HOLE_AND_FAILOVER = World(Budget(holes=1, failovers=1), client=False)
FAILOVER_AND_FORCED = World(Budget(pauses=1, failovers=1, forced=1), client=False)
EXPIRY = World(Budget(pauses=1, expiries=1), client=False)
WIPE = World(Budget(wipes=1), client=False)
FAILOVER = World(Budget(failovers=1, pauses=1), client=False)
CHANGED = World(Budget(), outdated=("A",))
CHANGED_AND_WIPE = World(Budget(wipes=1, crashes=1), outdated=("A",), client=False)

# Not here, for nothing needs them alone: abort's raised attempt (the state that it sets fences, too) and claim's look for
# a cancellation (a new owner is told with its first write). They save work, and stand behind the others.
# (script, what stands there, what stands there without the fence, a world that needs it)
FENCES = {
    "append: the state": ("append", "job[1] ~= 'leased' or ", "", PAUSE),
    "append: the attempt": ("append", "job[2] ~= ARGV[2] or ", "", THREADS),
    "append: the owner": ("append", " or job[3] ~= ARGV[3]", "", FAILOVER),
    "append: what stands before": ("append", "before, before) == 0", "before, before) < 0", HOLE),
    "append: what is there already": ("append", "not string.find(added.err, 'equal or smaller', 1, true)", "true", LATE),
    "finish: the state": ("finish", "job[1] ~= 'leased' or ", "", LATE),
    "finish: the attempt": ("finish", "job[2] ~= ARGV[2] or ", "", THREADS),
    "finish: the owner": ("finish", " or job[3] ~= ARGV[3]", "", FAILOVER),
    "finish: what stands before": ("finish", "before, before) == 0", "before, before) < 0", HOLE),
    "renew: the state": ("renew", "job[1] ~= 'leased' or ", "", PAUSE),
    "renew: the attempt": ("renew", "job[2] ~= attempt or ", "", THREADS),
    "renew: the owner": ("renew", " or job[3] ~= owner", "", FAILOVER),
    "release: the state": ("release", "job[1] ~= 'leased' or ", "", LATE),
    "release: the attempt": ("release", "job[2] ~= ARGV[2] or ", "", World(Budget(pauses=1, releases=1), ("A", "A"))),
    "release: the owner": (
        "release", " or job[3] ~= ARGV[3]", "", World(Budget(failovers=1, releases=1), client=False),
    ),
    "claim: the end": ("claim", "job[1] == 'ended'", "false", World(Budget(doubles=1))),
    "claim: the lease": (
        "claim", "job[1] == 'leased' and redis.call('ZSCORE', KEYS[4], ARGV[1])", "false", World(Budget(doubles=1)),
    ),
    "claim: the revision": ("claim", "tonumber(job[4] or 0) > tonumber(ARGV[7])", "false", CHANGED),
    "submit: the revision": ("submit", ", 'revision', ARGV[14]", "", CHANGED),
    "restore: the revision": (
        "restore", "unpack(ARGV, 10, entries - 1))",
        "unpack(ARGV, 10, entries - 1)) redis.call('HDEL', KEYS[1], 'revision')", CHANGED_AND_WIPE,
    ),
    "claim: the attempt is raised": ("claim", "'attempt', 1)", "'attempt', 1 - redis.call('EXISTS', KEYS[2]))", PAUSE),
    "claim: the marker": ("claim", "redis.call('XADD', KEYS[2], ", "type(", PAUSE),
    "claim: how far the journal goes": ("claim", "if top[1] then", "if false then", PAUSE),
    "requeue: the lease": ("requeue", "tonumber(lease) > now", "false", PAUSE),
    "requeue: the dead owner": ("requeue", " and job[2] ~= ARGV[2]", " and ARGV[2] == ''", DEATH),
    "requeue: the state": ("requeue", "job[1] ~= 'leased'", "false", PAUSE),
    "abort: the end": ("abort", " or job[1] == 'ended'", "", ABORT),
    "abort: the lease": ("abort", "tonumber(lease) > now", "false", ABORT),
    "abort: how far the journal goes": ("abort", "if top[1] then", "if false then", FORCED),
    "restore: the state": ("restore", "job[1] == 'leased' and ", "", HOLE),
    "restore: the attempt": ("restore", "job[2] == ARGV[2] and ", "", HOLE_AND_THREADS),
    "restore: the owner": ("restore", " and job[3] == ARGV[3]", "", HOLE_AND_FAILOVER),
    "restore: the end": ("restore", "job[1] ~= 'ended' and ", "", FAILOVER_AND_FORCED),
    "restore: an older attempt": ("restore", "tonumber(job[2]) < tonumber(ARGV[2])", "true", HOLE),
    "restore: the epoch": ("restore", "redis.call('GET', KEYS[5]) ~= ARGV[4]", "true", EXPIRY),
    "restore: the journal": ("restore", "for i = entries, #ARGV, 2 do", "for i = 1, 0 do", WIPE),
}  # fmt: skip


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    """On a database that no thread of another test writes to."""
    with redis.Redis.from_url(valkey.url.removesuffix("/0") + "/7", decode_responses=True) as found:
        yield found
        found.flushdb()


def leases(client: redis.Redis) -> Leases:
    return Leases(client, lease=3600.0, journal_ttl=3600.0, journal_max=50)


def without(client: redis.Redis, script: str, fence: str, instead: str) -> Leases:
    text = (resources.files("localai_q.bus") / "scripts" / f"{script}.lua").read_text()
    assert text.count(fence) == 1, f"{fence!r} does not stand in {script}.lua exactly once"
    made = leases(client)
    made._run[script] = client.register_script(text.replace(fence, instead))
    return made


def explored(client: redis.Redis, scripts: Leases, world: World) -> Explored:
    return Exploration(client, scripts, world).run()


@pytest.mark.parametrize("name", WORLDS)
def test_whatever_happens_in_whatever_order_nothing_is_lost_or_doubled_and_every_job_can_end(
    client: redis.Redis, name: str
) -> None:
    found = explored(client, leases(client), WORLDS[name])
    assert not found.violation, f"{found}"
    assert found.states >= LEAST


@pytest.mark.parametrize("fence", FENCES)
def test_without_any_one_fence_something_goes_wrong(client: redis.Redis, fence: str) -> None:
    script, text, instead, world = FENCES[fence]
    found = explored(client, without(client, script, text, instead), world)
    assert found.violation, f"nothing needs this fence: {found}"


@pytest.mark.xfail(strict=True, reason="attempt and index are all that a reader sees of who wrote an entry")
def test_after_a_fail_over_a_client_does_not_see_parts_of_two_answers(client: redis.Redis) -> None:
    found = explored(client, leases(client), SPLICED)
    assert not found.violation, f"{found}"
