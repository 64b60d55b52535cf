"""`localai-q up`: one line for what keeps it from starting; else a cluster, its facts, and nothing left at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e_cluster import folder_of_homes
from waiting import LIMIT, wait_for

from localai_q import ports
from localai_q.embedded.valkey import Valkey

COMMAND = [str(Path(sys.executable).parent / "localai-q"), "up"]
STAND_IN = Path(__file__).with_name("stand_in_web.py")
KEY = "lq-test-key"  # which the stand-in accepts


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not below pytest's folder: another session closes that to other users, such as the one Postgres runs as under root."""
    with folder_of_homes("lqpg") as folder:
        yield folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LOCALAI_")}
    address = f"127.0.0.1:{ports.choose()}"
    nodes = {"LOCALAI_NODE_NAME": "alpha", "TEST_NODES": "alpha,alpha-2"}
    return {**clean, **nodes, "LOCALAI_Q_HOME": str(tmp_path / "home"), "LOCALAI_ADDRESS": address}


def fails_with(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_busy_port(environment: dict[str, str]) -> None:
    host, port = environment["LOCALAI_ADDRESS"].split(":")
    with socket.create_server((host, int(port))):
        line = fails_with(environment)
    assert f"port {port} is used by" in line
    assert f"(pid {os.getpid()})" in line
    assert "LOCALAI_ADDRESS=127.0.0.1:" in line


def test_unwritable_home(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment["LOCALAI_Q_HOME"] = str(tmp_path / "file" / "home")
    line = fails_with(environment)
    assert str(tmp_path / "file" / "home") in line
    assert "set LOCALAI_Q_HOME" in line


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("LOCALAI_ADDRESS", "nonsense", "HOST:PORT"),
        ("LOCALAI_ADDRESS", "203.0.113.9:8080", "set LOCALAI_ADDRESS"),
        ("LOCALAI_REDIS_URL", "redis://127.0.0.1:1/0", "LOCALAI_REDIS_URL"),
        ("LOCALAI_DATABASE_URL", "postgresql://x@127.0.0.1:1/x", "LOCALAI_DATABASE_URL"),
    ],
)
def test_settings_that_cannot_work(environment: dict[str, str], name: str, value: str, fix: str) -> None:
    environment[name] = value
    if name == "LOCALAI_REDIS_URL":
        environment["LOCALAI_DATABASE_URL"] = "postgresql://x@127.0.0.1:1/x"
    assert fix in fails_with(environment)


def test_missing_procfile(environment: dict[str, str], tmp_path: Path) -> None:
    assert "--procfile" in fails_with(environment, "--procfile", str(tmp_path / "none"))
    assert "--procfile" in fails_with(environment, "--procfile", str(STAND_IN))


def start(environment: dict[str, str], procfile: Path) -> subprocess.Popen[str]:
    arguments = ["--nodes", "2", "--procfile", str(procfile)]
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_ready(environment: dict[str, str], up: subprocess.Popen[str]) -> dict[str, object]:
    ready = Path(environment["LOCALAI_Q_HOME"]) / "ready.json"
    assert wait_for(lambda: ready.exists() or up.poll() is not None), "not ready"
    assert up.poll() is None, up.communicate()
    assert ready.stat().st_mode & 0o777 == 0o600
    return json.loads(ready.read_text())


def test_a_cluster_comes_up_and_goes(environment: dict[str, str], tmp_path: Path) -> None:
    home = Path(environment["LOCALAI_Q_HOME"])
    procfile = tmp_path / "Procfile"
    show = "import os, time; print('LOCALAI_DATABASE_URL' in os.environ, flush=True); time.sleep(100)"
    procfile.write_text(f'web: python {STAND_IN}\nnode: python -c "{show}"\n')

    up = start(environment, procfile)
    facts = wait_ready(environment, up)
    assert facts["base_url"] == f"http://{environment['LOCALAI_ADDRESS']}"
    assert facts["node_ids"] == ["idalpha", "idalpha-2"]
    assert facts["model"] == "tiny"
    assert "runs on" in (line := fails_with(environment))
    assert f"pid {up.pid}" in line
    assert str(home / "ready.json") in line

    children = psutil.Process(up.pid).children(recursive=True)
    assert {child.name() for child in children} >= {"postgres", "valkey-server", "python"}
    up.send_signal(signal.SIGINT)
    out, err = up.communicate(timeout=LIMIT)
    assert up.returncode == 0
    assert not psutil.wait_procs(children, timeout=LIMIT)[1]
    assert not (home / "ready.json").exists()
    assert "fetching tiny on n1: downloading" in err
    assert f"$(cat {home / 'admin.key'})" in out
    assert (home / "logs" / "node-2.log").read_text() == "False\n"

    state = (home / "state.json").read_text()
    up = start(environment, procfile)
    assert wait_ready(environment, up)["node_ids"] == facts["node_ids"]
    assert (home / "state.json").read_text() == state
    children = psutil.Process(up.pid).children(recursive=True)
    up.kill()
    up.communicate()
    assert not psutil.wait_procs(children, timeout=LIMIT)[1]


def test_a_key_that_is_not_accepted_is_said_once_and_a_new_one_makes_the_cluster_ready(
    environment: dict[str, str], tmp_path: Path
) -> None:
    home = Path(environment["LOCALAI_Q_HOME"])
    home.mkdir()
    (home / "logs").mkdir(mode=0o755)  # as an earlier version made it
    (home / "admin.key").write_text("revoked")
    procfile = tmp_path / "Procfile"
    procfile.write_text(f"web: python {STAND_IN}\n")
    up = start(environment, procfile)
    assert up.stderr is not None
    said = ""
    while "reset-admin" not in said:
        said = up.stderr.readline()
        assert said, "it ended"
    assert str(home / "admin.key") in said
    time.sleep(1.5)
    assert not (home / "ready.json").exists()
    (home / "admin.key").write_text(KEY)
    wait_ready(environment, up)
    assert {path.name: path.stat().st_mode & 0o777 for path in (home / "logs", home / "files", home / "worker")} == {
        "logs": 0o700, "files": 0o700, "worker": 0o700,
    }  # fmt: skip
    up.send_signal(signal.SIGINT)
    assert "reset-admin" not in up.communicate(timeout=LIMIT)[1]


@pytest.mark.parametrize(
    "own", [{"postgres"}, {"valkey-server"}, set()], ids=["Redis is named", "Postgres is", "both are"]
)
def test_no_server_is_started_in_place_of_one_that_is_named(
    environment: dict[str, str], tmp_path: Path, database_url: str, valkey: Valkey, own: set[str]
) -> None:
    named = {"postgres": ("LOCALAI_DATABASE_URL", database_url), "valkey-server": ("LOCALAI_REDIS_URL", valkey.url)}
    environment |= dict(setting for server, setting in named.items() if server not in own)
    procfile = tmp_path / "Procfile"
    procfile.write_text(f"web: python {STAND_IN}\n")
    up = start(environment, procfile)
    wait_ready(environment, up)
    servers = {child.name() for child in psutil.Process(up.pid).children(recursive=True)} & named.keys()
    folders = {path.name for path in Path(environment["LOCALAI_Q_HOME"]).iterdir()} & {"postgres", "valkey"}
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=LIMIT)
    assert (up.returncode, servers, folders) == (0, own, {name.partition("-")[0] for name in own})
