"""What of a node's disk models may take, and what goes when nobody needs it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from localai_q.cluster.jobs import Job
from localai_q.cluster.models import Model
from localai_q.cluster.states import JobState

SPARE = 1 << 30  # bytes that stay free, where nobody says otherwise
SHARE = 20  # a twentieth of a file, where that is more
FRESH = 60.0  # seconds in which it becomes known which model a file is for
AGAIN = 60.0  # seconds after which a cleaning that failed, or that left something, is tried again at the earliest


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A model's file on a node."""

    sha256: str
    size: int  # bytes
    age: float  # seconds since it came, or was asked for


def spare(payload: int, least: int = SPARE) -> int:
    """Bytes that stay free on a disk when a file of so many comes."""
    return max(payload // SHARE, least)


def surplus(unnamed: Sequence[Blob], *, grace: float, free: int, floor: int) -> list[Blob]:
    """What goes of the files that no model names, the oldest first.

    A file that came less than `grace` seconds ago may be one for a model that is being added: it goes only if less than
    `floor` bytes would be free without that, and not in its first minute.
    """
    going: list[Blob] = []
    for blob in sorted(unnamed, key=lambda blob: (-blob.age, blob.sha256)):
        if blob.age >= grace or (blob.age >= FRESH and free < floor):
            going.append(blob)
            free += blob.size
    return going


def unnamed(files: Collection[str], models: Sequence[Model], others: Collection[str] = ()) -> list[str]:
    """The files, by SHA-256, that no model names. `others`: files that are needed besides."""
    return sorted(set(files).difference(others, *(model.config.contents for model in models)))


def is_due(files: Collection[str], last: Job | None, *, grace: float, now: float) -> bool:
    """Whether a node is to be cleaned of these files, `last` being the newest cleaning of it that was no dry run.

    A node lists what it has removed until it reports again, and keeps for a time what came lately.
    """
    if not files or (last and last.state is JobState.OPEN):
        return False
    if last is None or last.ended is None:
        return True
    if now > last.ended + max(grace, AGAIN):
        return True
    if last.state is not JobState.DONE:
        return now > last.ended + AGAIN
    return not _told(last.result or {}).issuperset(files)


def _told(result: dict[str, Any]) -> set[str]:
    """The files that a node says it has kept or removed."""
    removed = [blob.get("sha256") for blob in _list(result, "removed") if isinstance(blob, dict)]
    return {str(sha256) for sha256 in (*_list(result, "kept"), *removed)}


def _list(result: dict[str, Any], name: str) -> list[Any]:
    found = result.get(name)
    return found if isinstance(found, list) else []
