"""What `localai-q up` checks before it starts anything, and what it keeps in the home folder: its lock and its state.

Every check ends in one line that names the fix. It starts no process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localai_q import ports
from localai_q.config import Settings, ensure_secrets, read_state, state_file, write_private
from localai_q.errors import StartupError

READY_FILE = "ready.json"
KEY_FILE = "admin.key"
PRIVATE = ("logs", "files", "worker")  # folders that hold what people said and what they uploaded


def check_writable(home: Path) -> None:
    """Make the home folder, and in it the folders that only its owner may enter.

    Raises:
        StartupError: it cannot be made, or nothing can be written there.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
        for folder in (home / name for name in PRIVATE):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
    except OSError as error:
        raise StartupError(
            f"cannot write to {home} ({error.strerror}): set LOCALAI_Q_HOME to a folder that you can write"
        ) from error


def check_address(settings: Settings) -> None:
    """Check that the web process will be able to listen.

    Raises:
        StartupError: it will not.
    """
    host, port = settings.host, settings.port
    try:
        ports.check_bind(host, port)
    except socket.gaierror as error:
        raise StartupError(f"{host} has no address: set LOCALAI_ADDRESS, as 127.0.0.1:{port}") from error
    except OSError as error:
        raise StartupError(_address_problem(host, port, error)) from error


def _address_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = next((p for p in range(port + 1, min(port + 100, 65536)) if ports.is_free(host, p)), port + 1)
        return f"port {port} is used by {ports.holder(port)}: end that, or set LOCALAI_ADDRESS={host}:{other}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"you may not listen on port {port}: set LOCALAI_ADDRESS to a port above 1023, as {host}:8080"
    return f"cannot listen on {host}:{port} ({error.strerror}): set LOCALAI_ADDRESS, as 127.0.0.1:8080"


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home folder; the lock goes with the process, however that ends.

    Raises:
        StartupError: another `localai-q up` holds it.
    """
    with (home / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise StartupError(
                f"localai-q up runs on {home} already (pid {file.read().strip() or 'unknown'}; see "
                f"{home / READY_FILE}): stop that one, or set LOCALAI_Q_HOME and LOCALAI_ADDRESS for a second"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def complete_state(settings: Settings) -> dict[str, Any]:
    """The state of the home, with everything generated that is still missing.

    Keys are names of settings. `redis_url` stands for the embedded Valkey: its port and its password.
    """
    ensure_secrets(settings.home)
    state = read_state(settings.home)
    if not state.get("flower_port") or not ports.is_free("127.0.0.1", state["flower_port"]):
        state["flower_port"] = ports.choose()
        save_state(settings.home, state)
    return state


def save_state(home: Path, state: dict[str, Any]) -> None:
    """Write the state of the home, for its owner only."""
    write_private(state_file(home), json.dumps(state, indent=2) + "\n")


def is_embedded(settings: Settings, state: dict[str, Any], name: str) -> bool:
    """Whether the store behind the setting `name` (a URL) is ours to start: the environment names no other."""
    url = getattr(settings, name)
    return not url or url == state.get(name)


def valkey_choice(state: dict[str, Any]) -> tuple[int, str]:
    """Port and password of the embedded Valkey: those of the state, or new ones."""
    known = urlsplit(state.get("redis_url", ""))
    if known.port and known.password:
        return known.port, known.password
    return ports.choose(), secrets.token_urlsafe(24)
