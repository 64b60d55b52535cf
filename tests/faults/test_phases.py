"""Every part of the cluster is killed, paused and told to stop while jobs of every phase are there: none is lost."""

import signal
from collections.abc import Callable, Iterator
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import backend_of, node_of, owner, pids, send, stopped, strike
from waiting import LIMIT

PAUSE = 3.0  # seconds: longer than a lease
Ask = Callable[..., Caller]


def targets(cluster: Cluster, what: str, job_id: str) -> list[int]:
    """The processes meant by `what`; of those that there are several of, the one that works on the job."""
    match what:
        case "replica":
            return [owner(cluster, job_id)]
        case "backend":
            return [backend_of(owner(cluster, job_id))]
        case "node":
            return [node_of(owner(cluster, job_id))]
        case _:
            return pids(cluster, what)


# What is killed or ended twice in a row starts again later each time, so each comes round once per signal.
STRIKES = [
    *(("backend", SIGKILL), ("valkey", SIGKILL), ("node", SIGKILL), ("postgres", SIGKILL), ("control", SIGKILL)),
    *(("replica", SIGKILL), ("backend", SIGSTOP), ("valkey", SIGSTOP), ("node", SIGSTOP), ("postgres", SIGSTOP)),
    *(("control", SIGSTOP), ("replica", SIGSTOP), ("web", SIGSTOP), ("backend", SIGTERM), ("valkey", SIGTERM)),
    *(("node", SIGTERM), ("postgres", SIGINT), ("control", SIGTERM), ("replica", SIGTERM)),
]


@pytest.mark.parametrize(("what", "how"), STRIKES, ids=lambda each: getattr(each, "name", each))
def test_jobs_that_wait_begin_and_speak_end_whole(
    cluster: Cluster, ledger: Ledger, ask: Ask, what: str, how: signal.Signals
) -> None:
    replicas = pids(cluster, "replica")
    ahead = ask(numbers(100, delay_ms=40), "echo-one").until_said(1)
    waits = ask(numbers(10, delay_ms=20), "echo-one")
    speaks = ask(numbers(100, delay_ms=40)).until_said(5)
    begins = ask(numbers(10, delay_ms=20, first_ms=3000))
    whole = ask(numbers(80, delay_ms=40), stream=False)
    until(lambda: len(ledger.leased("echo")) == 3 and ledger.waiting("echo-one"), LIMIT, "a job in each phase")
    strike(cluster, targets(cluster, what, speaks.job), how, PAUSE)
    said = [caller.whole() for caller in (ahead, waits, speaks, begins, whole)]
    assert said == [counted(100), counted(10), counted(100), counted(10), counted(80)]
    if what not in ("backend", "replica", "node"):
        assert pids(cluster, "replica") == replicas


def test_a_backend_that_was_paused_goes_on_where_it_was(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    stream = ask(numbers(60, delay_ms=40)).until_said(5)
    paused = backend_of(owner(cluster, stream.job))
    strike(cluster, [paused], SIGSTOP, PAUSE)
    assert stream.whole() == counted(60)
    assert ledger.row(stream.job)["attempt"] == 1
    assert paused in pids(cluster, "backend")


@pytest.fixture
def slow_model(cluster: Cluster) -> Iterator[str]:
    """A model that takes long to load, and is not loaded."""
    cluster.cli("models", "add", "slow", "--backend", "echo", "--slots", "2", "--option", "load_ms:700")
    yield "slow"
    cluster.cli("models", "remove", "slow")


@pytest.mark.parametrize("what", ["replica", "backend", "node", "control", "valkey"])
def test_jobs_for_a_model_that_is_loading_end_whole(
    cluster: Cluster, ledger: Ledger, ask: Ask, slow_model: str, what: str
) -> None:
    stream = ask(numbers(10, delay_ms=20), slow_model)
    whole = ask(numbers(10, delay_ms=20), slow_model, stream=False)
    [pid] = until(lambda: [p for p in cluster.pids("-n slow.") if cluster.pids("server.py", f"--parent {p} ")], LIMIT,
                  "the replica that loads")  # fmt: skip
    which = {"replica": [pid], "backend": [], "node": []}.get(what)
    if what == "backend":
        which = [backend_of(pid)]
    elif what == "node":
        which = [node_of(pid)]
    send(which or pids(cluster, what), SIGKILL)
    assert [stream.whole(), whole.whole()] == [counted(10)] * 2
    *tries, last = loads(ledger)
    assert last == ("done", None)
    assert {state for state, _ in tries} <= {"failed"}
    assert what not in WHY or [error for _, error in tries if error and WHY[what] in error["message"]], tries


WHY = {"replica": "exit code -9", "backend": "the backend ", "node": "was started anew"}


def loads(ledger: Ledger) -> list[tuple[str, dict[str, Any] | None]]:
    """State and error of every load of the model that is slow to load, once all have ended."""

    def ended() -> list[tuple[str, Any]]:
        found = ledger.rows("SELECT j.state, j.error FROM jobs j JOIN models m ON m.id = j.model_id "
                            "WHERE j.kind = 'load_model' AND m.name = 'slow' ORDER BY j.created_at")  # fmt: skip
        return [(state, error) for state, error in found] if all(state != "open" for state, _ in found) else []

    return until(ended, LIMIT, "the end of the loads")


@pytest.mark.parametrize("what", ["replica", "node", "postgres"])
def test_an_end_that_is_not_written_down_yet_is_written_down_later(
    cluster: Cluster, ledger: Ledger, ask: Ask, what: str
) -> None:
    with stopped(pids(cluster, "control")):
        stream = ask(numbers(10, delay_ms=20)).until_said(1)
        which = targets(cluster, what, stream.job)
        assert stream.whole() == counted(10)
        send(which, SIGKILL)
        until(lambda: not set(which) & set(pids(cluster, "")), LIMIT, "the end of what was killed")
        assert [entry[2]["s"] for entry in ledger.journal(stream.job) if entry[2]["k"] == "e"] == ["done"]
    assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}


def test_what_dies_while_control_is_away_longer_than_a_lease_is_not_lost(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    streams = [ask(numbers(80, delay_ms=50)) for _ in range(4)]
    for stream in streams:
        stream.until_said(3)
    # Nor is the node started again, which would tell at once what has died.
    with stopped(pids(cluster, "control") + pids(cluster, "up")):
        send([node_of(owner(cluster, streams[0].job))], SIGKILL)
        until(lambda: ledger.lease_left("echo", streams[0].job) <= 0, LIMIT, "the end of a lease")
    assert {stream.whole() for stream in streams} == {counted(80)}
    assert ledger.row(streams[0].job)["attempt"] == 2
