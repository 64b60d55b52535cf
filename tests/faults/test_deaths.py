"""Whoever works on a job dies, is paused or leaves: another goes on, and nobody who asked can tell."""

import signal
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import backend_of, node_of, owner, pids, send, stopped
from waiting import LIMIT

LEASE = 2.0
Ask = Callable[..., Caller]


def victim(cluster: Cluster, what: str, replica: int) -> int:
    return {"replica": lambda: replica, "backend": lambda: backend_of(replica), "node": lambda: node_of(replica)}[
        what
    ]()


@pytest.mark.parametrize("what", ["replica", "backend", "node"])
def test_a_stream_goes_on_elsewhere_when_its_owner_is_killed(
    cluster: Cluster, ledger: Ledger, ask: Ask, what: str
) -> None:
    stream = ask(numbers(150, delay_ms=30)).until_said(5)
    send([victim(cluster, what, owner(cluster, stream.job))], signal.SIGKILL)
    assert stream.whole() == counted(150)
    assert ledger.row(stream.job) == {"state": "done", "attempt": 2, "error": None}


@pytest.mark.parametrize("what", ["replica", "backend", "node"])
def test_an_answer_in_one_piece_starts_anew_when_its_owner_is_killed(
    cluster: Cluster, ledger: Ledger, ask: Ask, what: str
) -> None:
    answer = ask(numbers(120, delay_ms=30), stream=False)
    [job] = until(lambda: ledger.leased("echo"), LIMIT, "the claim")
    until(lambda: len(ledger.journal(job)) > 4, LIMIT, "some tokens")
    send([victim(cluster, what, owner(cluster, job))], signal.SIGKILL)
    assert answer.whole() == counted(120)
    assert ledger.row(job) == {"state": "done", "attempt": 2, "error": None}


def test_eight_streams_over_two_replicas_are_whole_when_one_replica_dies(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    streams = [ask(numbers(150, delay_ms=40)) for _ in range(8)]
    for stream in streams:
        stream.until_said(3)
    send([owner(cluster, streams[0].job)], signal.SIGKILL)
    assert {stream.whole() for stream in streams} == {counted(150)}
    assert sorted(ledger.row(stream.job)["attempt"] for stream in streams) == [1] * 4 + [2] * 4


def test_an_owner_that_was_paused_for_two_leases_writes_nothing_when_it_wakes(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stream = ask(numbers(150, delay_ms=40)).until_said(5)
    paused = owner(cluster, stream.job)
    with stopped([paused, backend_of(paused)]):
        time.sleep(2 * LEASE)
        until(lambda: stream.said > 20, LIMIT, "the work of another owner")
    assert stream.whole() == counted(150)
    assert ledger.row(stream.job)["attempt"] == 2
    taken_over = next(place for place, entry in enumerate(ledger.journal(stream.job)) if entry[0] == 2)
    assert {attempt for attempt, _, _ in ledger.journal(stream.job)[taken_over:]} == {2}
    assert paused in pids(cluster, "replica echo@")


def test_an_owner_whose_paused_replica_alone_wakes_finds_its_backends_tokens_refused(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stream = ask(numbers(150, delay_ms=40)).until_said(5)
    paused = owner(cluster, stream.job)
    with stopped([paused]):  # its backend goes on, and fills the pipe
        until(lambda: any(entry[0] == 2 for entry in ledger.journal(stream.job)), LIMIT, "another owner")
    assert stream.whole() == counted(150)
    assert ledger.row(stream.job)["attempt"] == 2
    assert paused in pids(cluster, "replica echo@")


def test_a_node_that_is_told_to_stop_hands_its_generations_over(cluster: Cluster, ledger: Ledger, ask: Ask) -> None:
    streams = [ask(numbers(80, delay_ms=50)) for _ in range(3)]
    whole = [ask(numbers(80, delay_ms=50), stream=False)]
    for stream in streams:
        stream.until_said(3)
    send([node_of(owner(cluster, streams[0].job))], signal.SIGTERM)
    assert {caller.whole() for caller in streams + whole} == {counted(80)}
    assert max(stream.longest_gap for stream in streams) < LEASE  # nobody waited for a lease to run out
    assert {ledger.row(stream.job)["state"] for stream in streams} == {"done"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_job_that_two_backends_died_of_fails_with_their_words_and_is_left_alone(
    ledger: Ledger, ask: Ask, stream: bool
) -> None:
    neighbour = ask(numbers(80, delay_ms=50), "echo-one").until_said(1)
    poison = ask(numbers(9, delay_ms=50, exit_after=3, again=1), stream=stream).wait()
    assert "exit code 3" in poison.error["message"]
    assert "echo was told to exit" in poison.error["message"]
    assert neighbour.whole() == counted(80)
    [job] = [each for each, state in ledger.jobs().items() if state == "failed"]
    assert ledger.row(job)["attempt"] == 2
    before = ledger.journal(job)
    ledger.settle()
    assert ledger.journal(job) == before
    assert job not in ledger.waiting("echo") + ledger.leased("echo")


def test_a_backend_that_says_it_is_stuck_is_believed_only_where_something_was_cancelled(
    ledger: Ledger, ask: Ask
) -> None:
    poison = ask(numbers(9, delay_ms=50, exit_after=3, exit_status=75, again=1)).wait()
    assert "exit code 75" in poison.error["message"]
    assert ledger.row(poison.job)["state"] == "failed"


def test_a_request_that_cannot_be_cancelled_is_ended_with_its_backend_and_no_other_is_blamed(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    stuck, *neighbours = [ask(numbers(150, delay_ms=80, **more)) for more in [{"stuck_after": 3}, *[{}] * 7]]
    stuck.until_said(3)
    backend = backend_of(owner(cluster, stuck.job))

    def is_logged(words: str) -> bool:
        return any(words in path.read_text() for path in cluster.home.rglob("logs/backend-*.log"))

    until(lambda: is_logged("echo is stuck"), LIMIT, "the request that ignores its end")
    stuck.cut()
    assert {stream.whole() for stream in neighbours} == {counted(150)}
    assert not psutil.pid_exists(backend)
    assert ledger.row(stuck.job)["state"] == "cancelled"
    assert sorted(ledger.row(stream.job)["attempt"] for stream in neighbours) == [1] * 4 + [2] * 3
    deaths = Counter(ledger.redis.hget(f"job:{stream.job}", "deaths") for stream in neighbours)
    assert deaths == {None: 4, b"0": 3}  # of those that went nowhere, and of those that were given back
    assert is_logged("a request that was cancelled has not ended within 2 seconds")
