"""What ended children leave: in the node's folder `run/` (specs, sockets) and `logs/`, and temporary folders of jobs. Owns
what of it is removed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

KEPT = 20  # failed replicas, and failed jobs, whose logs are kept: those that wrote last


def clear(home: Path) -> None:
    """Remove what the children of an earlier process of this node have left. Nothing of it may run any more."""
    for path in _files(home / "run"):
        _remove(path)
    limit_logs(home, ())
    _limit(home, ("job-",), ())


def scratch(node_id: str) -> str:
    """How the names of temporary folders of a node's jobs begin: nobody else's do."""
    return f"localai_q-{node_id}-"


def clear_scratch(node_id: str) -> None:
    """Remove the temporary folders of jobs whose worker was killed. None of them may be at work any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch(node_id)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def limit_logs(home: Path, running: Container[str]) -> None:
    """Remove the logs of old replicas, by id, that are not among those that run."""
    _limit(home, ("replica-", "backend-"), running)


def remove_logs(home: Path, replica_id: str) -> None:
    """Remove the logs of a replica that has ended as it was asked to."""
    for path in _files(home / "logs"):
        if path.name.startswith((f"replica-{replica_id}.", f"backend-{replica_id}.")):
            _remove(path)


def remove_run(socket: Path) -> None:
    """Remove what a replica that has ended has left beside its socket, if it was killed: that, and what it loaded from."""
    for path in _files(socket.parent):
        if path.name.startswith((f"{socket.stem}.", f"{socket.stem}-")):
            _remove(path)


def _limit(home: Path, kinds: tuple[str, ...], running: Container[str]) -> None:
    logs: dict[str, list[Path]] = {}
    for path in sorted(_files(home / "logs"), key=_written, reverse=True):
        if path.name.startswith(kinds):
            logs.setdefault(path.name.partition("-")[2].partition(".")[0], []).append(path)
    ended = [paths for owner, paths in logs.items() if owner not in running]
    for paths in ended[KEPT:]:
        for path in paths:
            _remove(path)


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if not path.is_dir()]
    return []


def _written(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
