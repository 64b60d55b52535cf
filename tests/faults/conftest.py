"""The cluster of this folder's tests: two nodes, leases of two seconds, and a ledger that is drawn up after each test."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_cluster import BIN, ROOT, Cluster, clean_environment, folder_of_homes, processes_of, until
from ledger import Files, Ledger, until_nothing
from victims import Web, send
from waiting import LIMIT, wait_for

from localai_q import ports

SETTINGS = {
    "LOCALAI_Q_LEASE": "2",
    "LOCALAI_HEARTBEAT_INTERVAL": "1",
    "LOCALAI_REQUEST_TIMEOUT": "90",
    "LOCALAI_Q_DRAIN_TIMEOUT": "1",
    "LOCALAI_Q_CANCEL_PATIENCE": "2",
    "LOCALAI_Q_JOURNAL_MAX": "250",
    "LOCALAI_Q_WEB_DRAIN": "2",
    "LOCALAI_Q_STALLED_CLIENT": "3",
}
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def homes() -> Iterator[Path]:
    with folder_of_homes("lqfault") as folder:
        yield folder


@pytest.fixture(scope="session")
def cluster(homes: Path) -> Iterator[Cluster]:
    """`echo` with four slots on each of two nodes, and `echo-one` with one slot."""
    made = Cluster(homes / "shared", "--nodes", "2", "--no-model", **SETTINGS)
    made.start()
    try:
        made.cli("models", "add", "echo", "--backend", "echo", "--slots", "4", "--spread")
        made.cli("models", "add", "echo-one", "--backend", "echo", "--slots", "1")
        until(lambda: [r["state"] for r in made.replicas("echo")] == ["ready"] * 2, 60, "a replica on each node")
        Ledger(made).settle()
        yield made
    except BaseException as error:
        error.add_note(made.logs())
        made.kill()
        raise
    made.stop()


@pytest.fixture(scope="session")
def files(cluster: Cluster) -> Files:
    """Descriptors at the start, when every pool has seen a crowd."""
    crowd = Ledger(cluster)
    callers = [crowd.ask("warm up", ("echo", "echo-one")[number % 2]) for number in range(100)]
    for number, caller in enumerate(callers):
        if number % 4:
            caller.cut(("FIN", "RST")[number % 2])
        else:
            caller.whole()
    crowd.settle()
    return Files(cluster)


@pytest.fixture(autouse=True)
def ledger(cluster: Cluster, files: Files, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """What this test asks for. When it is over, every claim of the ledger is checked."""
    drawn = Ledger(cluster)
    yield drawn
    send([process.pid for process in processes_of(cluster.home)], signal.SIGCONT)
    if request.node.stash.get(FAILED, False):
        for caller in drawn.callers:
            caller.cut()
        drawn.settle()
        return
    drawn.check()
    until_nothing(files.grown, LIMIT, "more open files than before")


@pytest.fixture
def ask(ledger: Ledger) -> Callable[..., Any]:
    return ledger.ask


@pytest.fixture
def start_web(cluster: Cluster, homes: Path) -> Iterator[Callable[..., Web]]:
    """Starts another web process of the same cluster, with settings of its own."""
    made: list[Web] = []
    state = cluster.state()

    def start(**settings: str) -> Web:
        address = f"127.0.0.1:{ports.choose()}"
        environment = clean_environment(**{
            **SETTINGS, "LOCALAI_Q_HOME": str(homes / "web"), "LOCALAI_ADDRESS": address, "LOCALAI_Q_NO_MODEL": "1",
            "LOCALAI_DATABASE_URL": state["database_url"], "LOCALAI_REDIS_URL": state["redis_url"],
            "LOCALAI_REGISTRATION_TOKEN": state["registration_token"], **settings,
        })  # fmt: skip
        with (homes / "web.out").open("ab") as output:
            process = subprocess.Popen(
                [str(BIN / "gunicorn"), "--config", "python:api.gunicorn_conf", "api.wsgi:app"],
                env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        made.append(Web(address, process))

        def answers() -> bool:
            try:
                return httpx.get(f"http://{address}/readyz", trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        assert wait_for(answers), (homes / "web.out").read_text(errors="replace")[-4000:]
        return made[-1]

    yield start
    for web in made:
        web.process.terminate()
    for web in made:
        web.process.wait(LIMIT)
