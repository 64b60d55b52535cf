"""Clients leave, are told to stop, or run out of time: the job ends as it should, and its slot is free quickly."""

from collections.abc import Callable

import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import Web
from waiting import LIMIT

TIMES = 5
Ask = Callable[..., Caller]


def leave(cluster: Cluster, caller: Caller, job: str, how: str) -> None:
    if how == "DELETE":
        assert cluster.http.delete(f"/api/jobs/{job}").json()["state"] == "cancelling"
    else:
        caller.cut(how)


@pytest.mark.parametrize("how", ["DELETE", "FIN", "RST"])
@pytest.mark.parametrize("phase", ["prefill", "speaking"])
def test_a_running_job_that_is_given_up_frees_its_slot(
    cluster: Cluster, ledger: Ledger, ask: Ask, how: str, phase: str
) -> None:
    for _ in range(TIMES):
        text = numbers(200, delay_ms=40, first_ms=20_000) if phase == "prefill" else numbers(200, delay_ms=40)
        caller = ask(text, "echo-one")
        [job] = until(lambda: ledger.leased("echo-one"), LIMIT, "the claim")
        if phase == "speaking":
            caller.until_said(2)
        leave(cluster, caller, job, how)
        assert ask("my turn", "echo-one").whole() == "my turn"
        assert ledger.row(job)["state"] == "cancelled"
        assert not caller.wait().complete


@pytest.mark.parametrize("how", ["DELETE", "FIN", "RST"])
def test_a_waiting_job_that_is_given_up_is_never_served(cluster: Cluster, ledger: Ledger, ask: Ask, how: str) -> None:
    first = ask(numbers(100, delay_ms=40), "echo-one").until_said(1)
    caller = ask(numbers(5), "echo-one")
    [job] = until(lambda: ledger.waiting("echo-one"), LIMIT, "the job in its line")
    if how == "DELETE":
        assert cluster.http.delete(f"/api/jobs/{job}").json() == {"id": job, "state": "cancelled"}
        assert caller.wait().error["code"] == "cancelled"
    else:
        caller.cut(how)
    assert ledger.row(job)["state"] == "cancelled"
    assert [event["k"] for _, _, event in ledger.journal(job)] == ["e"]  # nobody ever claimed it
    assert not first.ended
    assert first.whole() == counted(100)


def test_a_call_in_one_piece_that_is_given_up_frees_its_slot(ledger: Ledger, ask: Ask) -> None:
    caller = ask(numbers(200, delay_ms=40), "echo-one", stream=False)
    [job] = until(lambda: ledger.leased("echo-one"), LIMIT, "the claim")
    caller.cut("FIN")
    assert ask("my turn", "echo-one").whole() == "my turn"
    assert ledger.row(job)["state"] == "cancelled"


def test_jobs_fail_at_their_deadline_whether_they_run_or_wait(
    ledger: Ledger, ask: Ask, start_web: Callable[..., Web]
) -> None:
    address = start_web(LOCALAI_REQUEST_TIMEOUT="1.5").address
    ahead = ask(numbers(80, delay_ms=40), "echo-one").until_said(1)
    waits = ask(numbers(5), "echo-one", address=address)
    runs = ask(numbers(200, delay_ms=40), address=address).until_said(1)
    whole = ask(numbers(200, delay_ms=40), address=address, stream=False)
    for caller in (runs, waits, whole):
        caller.wait()
        assert caller.error["code"] == "deadline_exceeded", caller.error
    assert ahead.whole() == counted(80)


def test_a_hundred_clients_that_come_and_go_leave_nothing(ledger: Ledger, ask: Ask) -> None:
    for wave in range(5):
        callers = [ask(numbers(100, delay_ms=50), ("echo", "echo-one")[number % 2]) for number in range(20)]
        until(lambda: len(ledger.leased("echo")) == 8, LIMIT, "every slot taken")
        for number, caller in enumerate(callers):
            caller.cut(("FIN", "RST")[(number + wave) % 2])
        until(lambda: not ledger.leased("echo") and not ledger.leased("echo-one"), LIMIT, "every slot free")
