"""A backend's process: started from its folder, asked for its health, ended. What it is asked besides is the caller's."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from localai_q.config import child_environment, settings
from localai_q.errors import StartupError
from localai_q.processes import spawn, stop, tail
from localai_q.proto import backend_pb2, backend_pb2_grpc

MESSAGE = 50 << 20  # bytes, as LocalAI has it
LOG_LINES = 8
OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE),
    ("grpc.max_send_message_length", MESSAGE),
    ("grpc.initial_reconnect_backoff_ms", 50),  # its socket appears within a second, not after gRPC's one
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class BackendProcess:
    """A backend that was started, and the channel to it.

    Args:
        folder: a version of a backend: LocalAI's `run.sh`, or our own server with its environment.
        socket: the path at which it is to listen.
        log: the file of its output.
        threads: calls that it answers at once; `run.sh` decides that by itself.
    """

    def __init__(self, folder: Path, *, socket: Path, log: Path, threads: int) -> None:
        token = secrets.token_urlsafe(32)
        self.metadata = (("authorization", f"Bearer {token}"),)
        self._socket = socket
        self._log = log
        self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._socket.unlink(missing_ok=True)
        patience = str(settings().cancel_patience)
        env = child_environment(
            LOCALAI_GRPC_AUTH_TOKEN=token, LOCALAI_Q_CANCEL_PATIENCE=patience, LOCALAI_Q_CHILD_SPEC=""
        )
        command = [*_program(folder, threads), "--addr", f"unix:{socket}"]
        self.process: subprocess.Popen[bytes] = spawn(command, env=env, log=log, cwd=folder, session=False)
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=OPTIONS)
        self.stub = backend_pb2_grpc.BackendStub(self._channel)

    def wait_for_health(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until it answers. That it never does is for the node to notice, which sees whether it still moves.

        Args:
            look: called again and again meanwhile; it may raise to stop.

        Raises:
            StartupError: it has ended instead.
        """
        while True:
            if self.process.poll() is not None:
                raise StartupError(self.said(f"the backend ended with exit code {self.process.returncode}"))
            try:
                self.check_health(1.0)
            except grpc.RpcError:
                look()
                time.sleep(0.05)
            else:
                return

    def check_health(self, timeout: float) -> None:
        """Raises `grpc.RpcError` if it does not answer within so many seconds."""
        self.stub.Health(backend_pb2.HealthMessage(), metadata=self.metadata, timeout=timeout)

    def stop(self, grace: float = 2.0) -> None:
        """End the process; it has nothing left to do."""
        self._channel.close()
        stop(self.process, grace)
        self._socket.unlink(missing_ok=True)

    def said(self, what: str) -> str:
        """What happened, with the backend's last words."""
        words = tail(self._log, lines=LOG_LINES, max_bytes=2048).strip()
        return f"{what}; its last words: {words}" if words else what


def _program(folder: Path, threads: int) -> list[str]:
    """LocalAI's `run.sh`, which knows `--addr` and no more, or our own server."""
    if (folder / "run.sh").exists():
        return [str(folder / "run.sh")]
    python = str(folder / "venv" / "bin" / "python")
    return [python, "server.py", "--threads", str(threads), "--parent", str(os.getpid())]
