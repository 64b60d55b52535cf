"""The Procfile under a runner of somebody else: a whole cluster where both stores are named, else one line that says so."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from e2e_cluster import BIN, ROOT, clean_environment, folder_of_homes, kill_all, processes_of
from waiting import wait_for

from localai_q import ports
from localai_q.embedded.valkey import Valkey

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def home() -> Iterator[Path]:
    with folder_of_homes("lqhoncho") as folder:
        yield folder / "home"
        kill_all(folder)


@pytest.fixture
def start(home: Path) -> Start:
    """Runs `honcho start` in the checkout, as a person does."""

    def run(**settings: str) -> subprocess.Popen[str]:
        environment = clean_environment(LOCALAI_Q_HOME=str(home), LOCALAI_NODE_NAME="byhand", **settings)
        return subprocess.Popen(
            [str(BIN / "honcho"), "--no-colour", "start"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return run


def test_without_both_urls_it_ends_with_a_line_that_says_so(start: Start, home: Path) -> None:
    said, _ = start().communicate(timeout=120)
    lines = [line.partition("|")[2].strip() for line in said.splitlines() if "localai-q:" in line]
    reason = "localai-q: LOCALAI_DATABASE_URL and LOCALAI_REDIS_URL must be set: run 'localai-q up'"
    assert any(line.startswith(reason) for line in lines), said
    assert "Traceback" not in said
    assert wait_for(lambda: not processes_of(home), 30)


def test_with_both_urls_it_is_a_cluster_whose_node_waits_for_its_approval(
    start: Start, home: Path, database_url: str, valkey: Valkey, redis_client: redis.Redis
) -> None:
    address = f"127.0.0.1:{ports.choose()}"
    cluster = {"LOCALAI_ADDRESS": address, "LOCALAI_Q_FLOWER_PORT": str(ports.choose()), "LOCALAI_Q_NO_MODEL": "1"}
    runner = start(LOCALAI_DATABASE_URL=database_url, LOCALAI_REDIS_URL=valkey.url, **cluster)

    def answers(path: str) -> int:
        try:
            return httpx.get(f"http://{address}{path}", timeout=10).status_code
        except httpx.HTTPError:
            return 0

    def cli(*arguments: str) -> str:
        environment = clean_environment(LOCALAI_Q_HOME=str(home), LOCALAI_Q_API=f"http://{address}")
        done = subprocess.run([str(BIN / "localai-q"), *arguments], env=environment, capture_output=True, text=True,
                              timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state() -> str:
        return next((node["state"] for node in json.loads(cli("nodes", "list", "--json"))), "")

    assert wait_for(lambda: answers("/readyz") == 200, 120)
    assert wait_for(lambda: state() == "pending", 60, every=0.5)
    assert cli("nodes", "approve", "byhand").strip() == "Approved byhand."
    assert wait_for(lambda: state() == "ready", 60, every=0.5)
    os.kill(runner.pid, signal.SIGTERM)
    said, _ = runner.communicate(timeout=60)
    assert {f"{name}.1" in said for name in ("web", "control", "node", "flower")} == {True}
    assert "Traceback" not in said, said
    assert wait_for(lambda: not processes_of(home), 30), processes_of(home)
