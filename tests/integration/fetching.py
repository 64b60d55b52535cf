"""Fetches of a file of a model, as tests of them begin."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from localai_q.cluster.events import Progress
from localai_q.config import load_settings
from workers.node import downloads, store
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access, origin

CONTENT = os.urandom(3 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = os.urandom(3 << 20)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing pause between two tries, or two reports."""
    monkeypatch.setattr(origin, "PAUSE", 0.0)
    monkeypatch.setattr(store, "WATCH", 0.02)
    monkeypatch.setattr(downloads, "REPORT_EVERY", 0.0)


def access(api_url: str = "http://127.0.0.1:9", **more: object) -> Access:
    settings = load_settings(**{"allow_private_sources": True, "disk_spare": 0, **more})
    return Access(settings, api_url, "n1", "secret")


def visible(root: Path) -> set[str]:
    folder = root / "blobs"
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()


def remains(root: Path) -> list[str]:
    """What lies in the folder besides whole files and the notes on them."""
    kept = (".used", ".source")
    return sorted(path.name for path in (root / "blobs").glob(".*") if path.suffix not in kept)


def ignore(event: Progress) -> None:
    """Progress that nobody watches."""


def get(root: Path, source: str, progress: Callable[[Progress], None] = ignore, **wanted: object) -> Path:
    return fetch(Wanted(**{"source": source, "sha256": DIGEST, **wanted}), root, access(), progress)
