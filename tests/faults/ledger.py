"""The ledger: after each test, everything that was accepted has ended once, was told once, and holds nothing any more."""

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg2
import redis
from callers import Caller, numbers
from e2e_cluster import Cluster, until
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from victims import by_role
from waiting import LIMIT

MODELS = {"echo": 8, "echo-one": 1}  # and their slots, over all nodes
SETTLED = 90.0  # seconds in which what a test has killed must be back
BACK = 60.0  # seconds in which a store must be back
ENDED = 60.0  # seconds in which what was accepted must have ended
MORE_FILES = 12  # descriptors that a process may have beyond those at the start: connections that pools keep

Entry = tuple[int, int, dict[str, Any]]  # attempt, index, event


class Ledger:
    """What one test asked for, and what must be true when it is over."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.callers: list[Caller] = []
        self.since = self.rows("SELECT clock_timestamp()")[0][0]
        patient = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=40)
        self.redis = redis.Redis.from_url(cluster.state()["redis_url"], retry=patient)

    def ask(
        self, text: str, model: str = "echo", *, stream: bool = True, headers: dict[str, str] | None = None,
        address: str = "", key: str = "", **more: Any,
    ) -> Caller:  # fmt: skip
        """Send a chat of one message, and follow it."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream, **more}
        return self.follow("/v1/chat/completions", body, headers=headers, address=address, key=key)

    def follow(
        self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST",
        headers: dict[str, str] | None = None, address: str = "", key: str = "",
    ) -> Caller:  # fmt: skip
        """Send a request, and remember what it shows."""
        caller = Caller(address or self.cluster.address, key or self.cluster.api_key, path, body, method=method,
                        headers=headers)  # fmt: skip
        self.callers.append(caller)
        return caller

    # What can be looked up, also while a store is on its way back.

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the cluster's database."""
        deadline = time.monotonic() + BACK
        while True:
            try:
                return self.cluster.sql(query, *values)
            except psycopg2.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def line(self, model: str) -> str:
        """The queue of a model."""
        return f"model.{self.rows('SELECT id FROM models WHERE name = %s', model)[0][0]}"

    def leased(self, model: str) -> list[str]:
        return [job.decode() for job in self.redis.zrange(f"leases:{self.line(model)}", 0, -1)]

    def waiting(self, model: str) -> list[str]:
        return [job.decode() for job in self.redis.zrange(f"waiting:{self.line(model)}", 0, -1)]

    def lease_left(self, model: str, job_id: str) -> float:
        """Seconds that a job's lease lives yet; not above 0 when it has none."""
        seconds, micros = self.redis.time()
        ends = self.redis.zscore(f"leases:{self.line(model)}", job_id) or 0.0
        return float(ends) / 1000 - seconds - micros / 1e6

    def row(self, job_id: str, timeout: float = ENDED) -> dict[str, Any]:
        """State, attempt and error of a job, once its end is written down."""

        def ended() -> list[tuple[Any, ...]]:
            return self.rows("SELECT state, attempt, error FROM jobs WHERE id = %s AND state <> 'open'", job_id)

        state, attempt, error = until(ended, timeout, f"the end of job {job_id}")[0]
        return {"state": state, "attempt": attempt, "error": error}

    def journal(self, job_id: str) -> list[Entry]:
        """The journal with its markers; empty when it is not kept any more."""
        found = []
        for place, fields in self.redis.xrange(f"gen:{job_id}"):
            attempt, _, index = place.decode().partition("-")
            found.append((int(attempt), int(index), json.loads(fields[b"e"])))
        return found

    # What must be true.

    def check(self) -> None:
        """Assert it all."""
        for caller in self.callers:
            caller.wait()
        self.settle()
        self._all_have_ended()
        for job_id in self.jobs():
            check_journal(job_id, self.journal(job_id))
        for caller in self.callers:
            self._was_told_the_truth(caller)
        until_nothing(self._left_in_redis, LIMIT, "left in Redis")
        self._every_slot_works()
        until_nothing(self._channels_left, LIMIT, "subscriptions of nobody")

    def settle(self) -> None:
        """Wait until every process is back and every model answers."""
        for model in MODELS:
            self.cluster.until_serving(model, SETTLED)
        until_nothing(self._missing, SETTLED, "processes too many or too few")

    def _missing(self) -> dict[str, int]:
        """How many processes there are too many or too few, by what they are."""
        found = Counter(name.partition("@")[0] for name, each in by_role(self.cluster).items() for _ in each)
        expected = Counter({"up": 1, "valkey": 1, "postgres": 1, "web": 2, "control": 1, "flower": 1, "node ": 2,
                            "jobs ": 2, "holder": 2, "replica echo": 2, "replica echo-one": 1, "backend": 3})  # fmt: skip
        return {name: found[name] - expected[name] for name in found | expected if found[name] != expected[name]}

    def jobs(self) -> dict[str, str]:
        """State by job, of those that were accepted since the test began."""
        return dict(self.rows("SELECT id, state FROM jobs WHERE created_at >= %s", self.since))

    def _open(self) -> list[str]:
        return [job for job, state in self.jobs().items() if state == "open"]

    def _all_have_ended(self) -> None:
        until_nothing(self._open, ENDED, "jobs without an end")
        until_nothing(lambda: self.redis.keys("ends:*"), LIMIT, "ends that are not written down")
        states = Counter(self.jobs().values())
        assert states.total() == states["done"] + states["cancelled"] + states["failed"]
        jobs = self.jobs()
        for caller in self.callers:
            if caller.job and caller.status == 200:
                assert caller.job in jobs, f"job {caller.job} was accepted and is not known"
            if caller.complete and caller.job:
                assert jobs[caller.job] == "done", (caller.job, jobs[caller.job])
            if caller.error and caller.job:
                assert jobs[caller.job] in ("failed", "cancelled"), (caller.job, caller.error)

    def _was_told_the_truth(self, caller: Caller) -> None:
        """What a client saw is what the journal says."""
        entries = self.journal(caller.job) if caller.job else []
        if not entries or caller.status != 200:
            return
        streamed = self.rows("SELECT stream FROM jobs WHERE id = %s", caller.job)[0][0]
        last = max(attempt for attempt, _, _ in entries)
        after = int(caller.after.rpartition("-")[2] or 0)
        shown = [entry for entry in entries if entry[1] > after and (streamed or entry[0] == last)]
        text = "".join(event.get("t", "") for _, _, event in shown if event["k"] == "d")
        if caller.complete or caller.error:
            assert caller.text == text, (caller.job, caller.text, text)
        else:
            assert text.startswith(caller.text), (caller.job, caller.text, text)
        places = {f"{caller.job}:{attempt}-{index}" for attempt, index, event in entries if event["k"] != "m"}
        ids = [seen.id for seen in caller.events if seen.id]
        assert set(ids) <= places, set(ids) - places
        indexes = [int(each.rpartition("-")[2]) for each in ids]
        assert indexes == sorted(set(indexes)), indexes

    def _left_in_redis(self) -> dict[str, Any]:
        """What a job holds while it lives, and must not hold now."""
        left: dict[str, Any] = {}
        for pattern in ("leases:*", "waiting:*", "ends:*"):
            left |= {key.decode(): "there" for key in self.redis.keys(pattern)}
        for model in MODELS:
            left |= {self.line(model): rung} if (rung := self.redis.llen(self.line(model))) else {}
        for key in self.redis.keys("job:*"):
            state = self.redis.hget(key, "state")
            if state not in (b"ended", None) or self.redis.ttl(key) == -1:
                left[key.decode()] = state
        left |= {key.decode(): "for ever" for key in self.redis.keys("gen:*") if self.redis.ttl(key) == -1}
        left |= {"unacked": unacked} if (unacked := self.redis.hlen("unacked")) else {}
        return left

    def _channels_left(self) -> dict[str, int]:
        """Subscriptions of nobody who lives, by channel; a negative number is of those that are missing."""
        processes = by_role(self.cluster)
        expected = Counter[str]()
        for node_id, name in self.rows("SELECT id, name FROM nodes"):
            expected[f"cancel:{node_id}"] = sum(
                what.startswith(("jobs", "replica")) and what.endswith(f"@{name}") for what in processes
            )
        found = Counter(
            {name.decode(): number for name, number in self.redis.pubsub_numsub(*self.redis.pubsub_channels("*:*"))}
        )
        webs = {name: found.pop(name) for name in list(found) if name.startswith("web:")}
        left = {name: found[name] - expected[name] for name in found | expected if found[name] != expected[name]}
        return left | ({} if sum(webs.values()) == len(processes["web"]) - 1 else {"web:*": sum(webs.values())})

    def _every_slot_works(self) -> None:
        """As many requests as there are slots are at work at once."""

        def crowd() -> bool:
            asked = [self.ask(numbers(1, first_ms=250), model) for model, slots in MODELS.items() for _ in range(slots)]
            most = Counter[str]()
            while not all(caller.ended for caller in asked):
                for model in MODELS:
                    most[model] = max(most[model], len(self.leased(model)))
            for caller in asked:
                assert caller.whole() == "0"
            return dict(most) == MODELS

        until(crowd, LIMIT, "every slot at work at once")
        until_nothing(self._open, ENDED, "jobs without an end")


class Files:
    """How many files each process has open, against the start."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._at_start = self._now()

    def _now(self) -> dict[str, int]:
        """The most of any process, by what it is."""
        found: dict[str, int] = {}
        for name, processes in by_role(self._cluster).items():
            if name.startswith(("web", "replica", "control", "node", "jobs", "backend")):
                kind = name.partition("@")[0]
                found[kind] = max(found.get(kind, 0), *(process.num_fds() for process in processes))
        return found

    def grown(self) -> dict[str, tuple[int, int]]:
        """Then and now, of those that have too many."""
        now = self._now()
        return {
            kind: (before, now[kind])
            for kind, before in self._at_start.items()
            if now.get(kind, 0) > before + MORE_FILES
        }


def check_journal(job_id: str, entries: list[Entry]) -> None:
    """Indexes without a gap or a repetition, attempts that never fall, one end, and that the last entry."""
    attempt, index = 0, 0
    for place, (by, at, event) in enumerate(entries):
        where = f"job {job_id}, entry {by}-{at}: {[entry[:2] for entry in entries]}"
        assert by >= attempt, f"an older attempt wrote: {where}"
        if event["k"] == "m":
            assert (by > attempt, at) == (True, index), f"a marker that is out of place: {where}"
        else:
            assert at == index + 1, f"a gap or a repetition: {where}"
        assert (event["k"] == "e") == (place == len(entries) - 1), f"the end is not the last entry: {where}"
        attempt, index = by, at


def until_nothing(probe: Callable[[], Any], timeout: float, what: str) -> None:
    """Wait until `probe` finds nothing; fails with what it found last."""
    found: Any = None

    def nothing() -> bool:
        nonlocal found
        found = probe()
        return not found

    deadline = time.monotonic() + timeout
    while not nothing():
        assert time.monotonic() < deadline, f"{what}, after {timeout:g} s: {found}"
        time.sleep(0.1)
