"""The backend process of a replica: started, loaded, asked, watched. Owns its life; what it is asked is the runner's."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from localai_q.config import child_environment
from localai_q.errors import StartupError
from localai_q.processes import kill_group, spawn, stop, tail
from localai_q.proto import backend_pb2, backend_pb2_grpc
from workers.child import ReplicaSpec
from workers.replica.options import model_options

log = logging.getLogger(__name__)

PROBE_EVERY = 5.0  # seconds between two health checks
PROBE_TIMEOUT = 5.0
PROBES_MISSED = 3  # after so many in a row the backend counts as wedged
MESSAGE = 50 << 20  # bytes, as LocalAI has it
LOG_LINES = 8
SPARE_THREADS = 16  # of a backend, for what is asked of it besides its slots' requests


class Backend:
    """A running backend with a loaded model."""

    def __init__(self, spec: ReplicaSpec, *, on_death: Callable[[str], None]) -> None:
        self._spec = spec
        self._on_death = on_death
        self._token = secrets.token_urlsafe(32)
        self._metadata = (("authorization", f"Bearer {self._token}"),)
        self._stopping = False
        self.death = ""  # why it died, once `dead` is set
        self.dead = threading.Event()
        self._process = self._start()
        options = [
            ("grpc.max_receive_message_length", MESSAGE),
            ("grpc.max_send_message_length", MESSAGE),
            ("grpc.initial_reconnect_backoff_ms", 50),  # its socket appears within a second, not after gRPC's one
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channel = grpc.insecure_channel(f"unix:{spec.socket}", options=options)
        self._stub = backend_pb2_grpc.BackendStub(self._channel)

    def load(self) -> None:
        """Wait until it answers, and have it load the model.

        Raises:
            StartupError: it does not come up, or cannot load the model; the message has its own words.
        """
        self._wait_for_health()
        try:
            result = self._stub.LoadModel(model_options(self._spec), metadata=self._metadata)
        except grpc.RpcError as error:
            raise StartupError(self._said(f"the backend could not load the model: {error.details()}")) from error
        if not result.success:
            raise StartupError(f"the backend could not load the model: {result.message}")
        threading.Thread(target=self._watch_process, name="backend-exit", daemon=True).start()
        threading.Thread(target=self._probe, name="backend-health", daemon=True).start()

    def stream(self, options: Any) -> Any:
        """Begin a generation: an iterator of replies that can be cancelled."""
        return self._stub.PredictStream(options, metadata=self._metadata)

    def embed(self, options: Any) -> Any:
        """Begin an embedding: a future of the result."""
        return self._stub.Embedding.future(options, metadata=self._metadata)

    def stop(self, grace: float = 2.0) -> None:
        """End the process; it has nothing left to do."""
        self._stopping = True
        self._channel.close()
        stop(self._process, grace)
        self._spec.socket.unlink(missing_ok=True)

    def _start(self) -> subprocess.Popen[bytes]:
        self._spec.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._spec.socket.unlink(missing_ok=True)
        if self._spec.log.exists():  # of the process before this one, whose last words are not this one's
            self._spec.log.replace(self._spec.log.with_suffix(".1.log"))
        env = child_environment(LOCALAI_GRPC_AUTH_TOKEN=self._token, LOCALAI_Q_CHILD_SPEC="")
        command = [*self._program(), "--addr", f"unix:{self._spec.socket}"]
        return spawn(command, env=env, log=self._spec.log, cwd=self._spec.backend_folder)

    def _program(self) -> list[str]:
        """LocalAI's `run.sh`, which knows `--addr` and no more, or our own server."""
        folder = self._spec.backend_folder
        if (folder / "run.sh").exists():
            return [str(folder / "run.sh")]
        threads = self._spec.model.slots + SPARE_THREADS
        python = str(folder / "venv" / "bin" / "python")
        return [python, "server.py", "--threads", str(threads), "--parent", str(os.getpid())]

    def _wait_for_health(self) -> None:
        """Wait until it answers; that it never does is for the node to notice, which sees whether it still moves."""
        while True:
            if self._process.poll() is not None:
                raise StartupError(self._said(f"the backend ended with exit code {self._process.returncode}"))
            try:
                self._stub.Health(backend_pb2.HealthMessage(), metadata=self._metadata, timeout=1.0)
            except grpc.RpcError:
                time.sleep(0.05)
            else:
                return

    def _watch_process(self) -> None:
        code = self._process.wait()
        if not self._stopping:
            self._die(f"the backend ended with exit code {code}")

    def _probe(self) -> None:
        missed = 0
        while not self._stopping and not self.dead.is_set():
            time.sleep(PROBE_EVERY)
            try:
                self._stub.Health(backend_pb2.HealthMessage(), metadata=self._metadata, timeout=PROBE_TIMEOUT)
                missed = 0
            except grpc.RpcError as error:
                missed += 1
                log.warning(
                    "the backend did not answer a health check (%s of %s): %s", missed, PROBES_MISSED, error.code()
                )
            if missed >= PROBES_MISSED and not self._stopping:
                self._die(f"the backend did not answer {missed} health checks")
                kill_group(self._process)

    def _die(self, what: str) -> None:
        if not self.dead.is_set():
            self.death = self._said(what)
            self.dead.set()
            self._on_death(self.death)

    def _said(self, what: str) -> str:
        """What happened, with the backend's last words."""
        words = tail(self._spec.log, lines=LOG_LINES, max_bytes=2048).strip()
        return f"{what}; its last words: {words}" if words else what
