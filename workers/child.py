"""What a node tells the processes that it starts, and what they tell it back. One file down, one pipe up."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from localai_q.cluster import parts
from localai_q.cluster.models import File, ModelConfig
from localai_q.config import settings, write_private
from localai_q.errors import StartupError

ALIVE = "alive"  # what a child says to be heard of; no state
CHANGED = "changed"  # what it says when it may have changed what lies on this machine; no state
ALIVE_EVERY = 3.0  # seconds
FINISH = signal.SIGUSR2  # to a replica that is ready: end once what is at work has ended; SIGTERM gives it little time


class ModelSpec(ModelConfig):
    """A model as a node is told of it. What a newer API knows of models besides is none of its business."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    name: str
    revision: int


class ReplicaSpec(BaseModel):
    """What a replica process serves, and with what."""

    model_config = ConfigDict(frozen=True)

    id: str
    number: int
    job: str  # that its load is
    gpu: bool = False  # whether memory of GPUs was booked for it
    model: ModelSpec
    backend_folder: Path
    blobs: Path  # the node's files of models, by their SHA-256
    socket: Path
    log: Path

    def path_of(self, file: File) -> Path:
        """Where a file of the model lies."""
        return self.blobs / str(file.sha256)

    @property
    def model_file(self) -> Path | None:
        """What the backend opens as the model's own file."""
        return next(iter(self.links), None) or (self.path_of(self.model.own[0]) if self.model.own else None)

    @property
    def links(self) -> dict[Path, Path]:
        """Of a model in several files: what leads to each while it loads, for an engine finds them by their names."""
        own = self.model.own
        if len(own) < 2:
            return {}
        names = parts.named(self.socket.stem, len(own))
        return {self.socket.with_name(name): self.path_of(file) for name, file in zip(names, own, strict=True)}

    @property
    def template_file(self) -> Path:
        """Where the backend reads the model's chat template, if it has one of its own."""
        return self.socket.with_suffix(".jinja")


class ChildSpec(BaseModel):
    """What a node tells a child. It may hold the broker's password, so its file is private."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    node_id: str
    node_name: str
    redis_url: str
    lease: float
    journal_ttl: float
    journal_max: int
    load_stall: float
    status_fd: int
    backends: Path
    models: Path
    api_url: str
    identity: Path  # the file of the node's secret
    replica: ReplicaSpec | None = None


def write_spec(path: Path, spec: ChildSpec) -> None:
    """Leave the spec for a child that is about to start."""
    write_private(path, spec.model_dump_json())


def read_spec() -> ChildSpec:
    """The spec that this process was started with; its file goes, for it may hold a password.

    Raises:
        StartupError: it was not started by a node.
    """
    path = settings().child_spec
    if path is None:
        raise StartupError("this worker is a part of a node, which starts it: run 'celery -A localai_q worker' instead")
    try:
        spec = ChildSpec.model_validate_json(path.read_text())
        path.unlink()
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read what the node left in {path}: {error}") from error
    return spec


class StatusPipe:
    """The child's end: one JSON line for each change of state, and one every few seconds that says that it lives."""

    def __init__(self, fd: int) -> None:
        self.figures: Callable[[], dict[str, Any]] = dict  # what to add to all that it says
        self._fd = fd
        self._lock = threading.Lock()  # a long line is not written at once
        threading.Thread(target=self._stay_alive, name="alive", daemon=True).start()

    def say(self, state: str, reason: str = "") -> None:
        self._write({"state": state, "reason": reason, **self.figures()})

    def _write(self, said: dict[str, Any]) -> None:
        line = json.dumps(said) + "\n"
        try:
            with self._lock:
                os.write(self._fd, line.encode())
        except OSError:  # the node is gone; this process is about to be, too
            return

    def _stay_alive(self) -> None:
        while True:
            time.sleep(ALIVE_EVERY)
            self._write({"state": ALIVE, **self.figures()})


def read_statuses(fd: int) -> Iterator[dict[str, Any]]:
    """The node's end: what the child says, until it ends."""
    with os.fdopen(fd, "r", encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue
