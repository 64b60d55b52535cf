"""One machine's cluster, as `localai-q up` runs it: which processes, with which environment, in which order.

It leaves keeping them running to `localai_q.supervisor`, the servers to `localai_q.embedded`, the checks and the state
to `localai_q.cli.home`, and the waiting to `localai_q.cli.watch`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import redis
from honcho.environ import parse_procfile

from localai_q.cli import home as home_folder
from localai_q.cli import watch
from localai_q.config import Settings, child_environment, load_settings, write_private
from localai_q.embedded.postgres import Postgres
from localai_q.embedded.valkey import Valkey, bind_addresses
from localai_q.errors import StartupError
from localai_q.supervisor import STORES, Spec, Supervisor, command_spec, say

RANKS = {"node": 0, "web": 1}  # what the Procfile names besides these stops after them
OTHER_RANK = 2
VALKEY_RANK, POSTGRES_RANK = STORES, STORES + 1


@dataclass(frozen=True)
class Options:
    """What the command line of `up` chooses."""

    nodes: int
    with_model: bool
    procfile: Path


@dataclass(frozen=True)
class Facts:
    """What ready.json holds, and what a person is told at the end of a start."""

    base_url: str
    api_key: str
    flower_url: str
    node_ids: list[str]
    model: str | None


def default_procfile() -> Path:
    """The Procfile of the checkout that this package lies in."""
    return Path(__file__).resolve().parents[2] / "Procfile"


def read_procfile(path: Path) -> dict[str, list[str]]:
    """The processes of a Procfile, as argument lists by name; no shell takes part.

    Raises:
        StartupError: it cannot be read, or has no line for `web`.
    """
    try:
        found: dict[str, str] = parse_procfile(path.read_text()).processes
        commands = {name: shlex.split(line) for name, line in found.items()}
    except (OSError, ValueError, AssertionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"cannot use {path} ({reason}): name a Procfile with --procfile") from error
    if "web" not in commands:
        raise StartupError(f"{path} has no line 'web: ...': name another Procfile with --procfile")
    return commands


def node_names(settings: Settings, count: int) -> list[str]:
    """The names of this machine's nodes: its own name, then that with -2, -3, and so on."""
    first = settings.effective_node_name
    return [first, *(f"{first}-{number}" for number in range(2, count + 1))][:count]


class Machine:
    """The processes of one home folder, brought up step by step by `bring_up`, and then kept running.

    Args:
        settings: with an absolute home, checked and locked by the caller.
        stopping: set by the caller to end `bring_up` early.
    """

    def __init__(self, settings: Settings, options: Options, stopping: threading.Event) -> None:
        self.settings = settings
        self.options = options
        self.stopping = stopping
        self.commands = read_procfile(options.procfile)
        self.supervisor = Supervisor()
        self.logs = settings.home / "logs"
        self.ready_file = settings.home / home_folder.READY_FILE
        self.key_file = settings.home / home_folder.KEY_FILE

    def bring_up(self) -> Facts:
        """Start everything and wait until it is useful.

        Raises:
            StartupError: something cannot start; what was started is left to `supervisor.stop`.
            watch.Stopped: `stopping` was set.
        """
        self._start_stores()
        self._migrate()
        self._start_processes()
        return self._wait()

    def _start_stores(self) -> None:
        state = home_folder.complete_state(self.settings)
        home, host = self.settings.home, self.settings.host
        if home_folder.is_embedded(self.settings, state, "redis_url"):
            port, password = home_folder.valkey_choice(state)
            valkey = Valkey(home, port=port, password=password, host=host)
            state["redis_url"] = valkey.url
            home_folder.save_state(home, state)
            self.supervisor.add(Spec("valkey", valkey.start, valkey.log, VALKEY_RANK))
            valkey.wait_ready(60.0)
        if home_folder.is_embedded(self.settings, state, "database_url"):
            postgres = Postgres(home)
            state["database_url"] = postgres.url
            if not (postgres.data / "PG_VERSION").exists():
                say("making the database (a few seconds, this first time)")
            self.supervisor.add(Spec("postgres", postgres.start, postgres.log, POSTGRES_RANK, signal.SIGINT))
            postgres.wait_ready(60.0)
        home_folder.save_state(home, state)
        self.settings = load_settings(home=home)
        self._go_on()

    def _go_on(self) -> None:
        if self.stopping.is_set():
            raise watch.Stopped

    def _migrate(self) -> None:
        from localai_q.store.migrate import upgrade

        try:
            redis.Redis.from_url(self.settings.redis_url, socket_connect_timeout=10).ping()
        except (redis.RedisError, ValueError) as error:
            raise StartupError(f"cannot use Redis (LOCALAI_REDIS_URL): {error}") from error
        upgrade(self.settings.database_url)
        self._go_on()

    def _start_processes(self) -> None:
        """Start everything; the nodes wait for the API by themselves."""
        for name, argv in self.commands.items():
            if name != "node":
                self._add(name, argv, self._environment(), RANKS.get(name, OTHER_RANK))
        for number, name in enumerate(self._nodes(), start=1):
            process = "node" if number == 1 else f"node-{number}"
            self._add(process, self.commands["node"], self._node_environment(name), RANKS["node"])
        self.client = watch.Client(self.settings.base_url, self.key_file)
        watch.wait_for_web(self.client, self.logs / "web.log", self.stopping)

    def _add(self, name: str, argv: list[str], env: dict[str, str], rank: int) -> None:
        folder = self.options.procfile.parent
        self.supervisor.add(command_spec(name, argv, env=env, logs=self.logs, cwd=folder, rank=rank))

    def _nodes(self) -> list[str]:
        return node_names(self.settings, self.options.nodes) if "node" in self.commands else []

    def _environment(self, **changes: str) -> dict[str, str]:
        """The environment of a process that uses the stores."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{child_environment().get('PATH', os.defpath)}"
        common = {"PATH": path, "PYTHONUNBUFFERED": "1", "LOCALAI_Q_HOME": str(self.settings.home)}
        if not self.options.with_model:
            common["LOCALAI_Q_NO_MODEL"] = "1"
        stores = {"LOCALAI_DATABASE_URL": self.settings.database_url, "LOCALAI_REDIS_URL": self.settings.redis_url}
        return child_environment(**{**common, **stores, **changes})

    def _node_environment(self, name: str) -> dict[str, str]:
        """The environment of a node: how to register, and nothing of the stores, nor a home that tells of them."""
        return self._environment(
            LOCALAI_DATABASE_URL="",
            LOCALAI_REDIS_URL="",
            LOCALAI_Q_FLOWER_PASSWORD="",
            LOCALAI_Q_HOME=str(self.settings.home / "worker"),
            LOCALAI_REGISTER_TO=self.settings.base_url,
            LOCALAI_REGISTRATION_TOKEN=self.settings.registration_token,
            LOCALAI_NODE_NAME=name,
        )

    def _wait(self) -> Facts:
        node_ids = watch.wait_for_nodes(self.client, self._nodes(), self.logs / "node.log", self.stopping)
        model = ""
        if self.options.with_model and node_ids:
            model = watch.wait_for_model(self.client, self.logs / "node.log", self.stopping)
        flower_url = f"http://127.0.0.1:{self.settings.flower_port}"
        self.client.close()  # an open connection would hold up the end of the web process
        return Facts(self.settings.base_url, self.client.key(), flower_url, node_ids, model or None)

    def write_ready(self, facts: Facts) -> None:
        """Write ready.json, for its owner only."""
        write_private(self.ready_file, json.dumps(vars(facts), indent=2) + "\n")

    def remove_ready(self) -> None:
        """Remove ready.json: nothing is up."""
        self.ready_file.unlink(missing_ok=True)

    def describe(self, facts: Facts) -> str:
        """The facts as lines to read, and to paste."""
        state_file = self.settings.home / "state.json"
        lines = [
            "localai-q is up.",
            f"  API       {facts.base_url}/v1",
            f"  API key   in {self.key_file}",
            f"  Flower    {facts.flower_url}  (user admin, password: flower_password in {state_file})",
            f"  Logs      {self.logs}",
            "Try it:",
            f"  {self._curl(facts)}",
            "Another machine joins, in a checkout of its own and after 'make install', with:",
            f"  {self._join_line()}",
        ]
        if bind_addresses(self.settings.host) == ["127.0.0.1"]:
            lines.append(
                f"  (other machines reach this one only after a start with LOCALAI_ADDRESS=0.0.0.0:{self.settings.port})"
            )
        return "\n".join([*lines, "Ctrl-C stops everything."])

    def _curl(self, facts: Facts) -> str:
        key = f'-H "Authorization: Bearer $(cat {shlex.quote(str(self.key_file))})"'
        if facts.model is None:
            return f"curl {facts.base_url}/v1/models {key}"
        body = {"model": facts.model, "messages": [{"role": "user", "content": "Say hello."}]}
        data = f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
        return f"curl {facts.base_url}/v1/chat/completions {key} {data}"

    def _join_line(self) -> str:
        url = f"http://{outward_address(self.settings.host)}:{self.settings.port}"
        token = shlex.quote(self.settings.registration_token)
        return f"LOCALAI_REGISTER_TO={url} LOCALAI_REGISTRATION_TOKEN={token} .venv/bin/celery -A localai_q worker"


def outward_address(host: str) -> str:
    """By which address other machines reach a server that listens on `host`."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104
        return f"[{host}]" if ":" in host else host
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # a documentation address: chooses a route, sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
