"""What can be installed by name: what this version comes with, what admins have given the archive of, and what is in the
galleries that settings name.

A gallery is read anew after `FRESH` seconds, in the background, by each process for itself. What was read stays if that
fails. Addresses that sources of models may not lead to are refused here, too.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from localai_q.cluster.builds import Build
from localai_q.config import BUILTIN, EXTERNAL, Settings
from localai_q.errors import InvalidValue, LocalAIError, NotFound, Unavailable
from localai_q.gallery import catalog
from localai_q.gallery.catalog import BackendEntry, ForeignEntry, ModelEntry
from localai_q.network import Network
from localai_q.services.wiring import Services
from localai_q.store import backends as rows

log = logging.getLogger(__name__)

GITHUB = re.compile(r"github:(?://)?([\w.-]+/[\w.-]+)/([^@]+)@([\w./-]+)")  # LocalAI's word for a file there
FRESH = 60.0  # seconds
LARGEST = 4 << 20  # bytes

AnyModel = ModelEntry | ForeignEntry
Entry = TypeVar("Entry")

_lock = threading.Lock()


class Gallery(Generic[Entry]):
    """What one gallery has said last."""

    def __init__(self, place: str, read: Callable[[str, str], tuple[tuple[Entry, ...], str]]) -> None:
        self.place = place
        self.entries: tuple[Entry, ...] = ()
        self._read = read
        self.error = ""
        self._due = 0.0
        self._reading = threading.Lock()

    def look(self, settings: Settings, *, wait: bool = True) -> None:
        """Read it, if that is due: the first time at once if this may wait for it, else in the background."""
        if time.monotonic() < self._due:
            return
        if wait and not self._due:
            self._look(settings)
        elif not self._reading.locked():
            threading.Thread(target=self._look, args=(settings,), name="gallery", daemon=True).start()

    def look_now(self, settings: Settings) -> None:
        """Read it, due or not."""
        self._due = 0.0
        self._look(settings)

    def _look(self, settings: Settings) -> None:
        with self._reading:
            if time.monotonic() < self._due:
                return
            try:
                self.entries, self.error = self._read(read_text(self.place, settings), self.place)
            except LocalAIError as error:
                if error.message != self.error:
                    log.warning("gallery %s: %s", self.place, error.message)
                self.error = error.message
            self._due = time.monotonic() + FRESH


_of_backends: dict[str, Gallery[BackendEntry]] = {}
_of_models: dict[str, Gallery[AnyModel]] = {}


def backends(services: Services) -> list[BackendEntry]:
    """Every backend that can be installed; of two that have one name the first."""
    return [entry for _, entry in listed(services)]


def listed(services: Services) -> list[tuple[str, BackendEntry]]:
    """The same, each after the name of its gallery."""
    own = [(BUILTIN, entry) for entry in catalog.catalog().backends]
    return _firsts(own, [(EXTERNAL, entry) for entry in external(services)], _of_galleries(services))


def backend(services: Services, wanted: str) -> BackendEntry:
    """The backend of that name, or else of that alias, or of either as `gallery@name`.

    Raises:
        NotFound: there is none; the message lists those that are.
    """
    gallery, _, name = wanted.rpartition("@")
    found = [(where, entry) for where, entry in listed(services) if gallery in ("", where)]
    known = {entry.alias: entry for _, entry in reversed(found)} | {entry.name: entry for _, entry in found}
    if name not in known:
        names = ", ".join(entry.name for _, entry in found)
        place = f"gallery {gallery!r}, or an earlier one has it, too" if gallery else "catalogue"
        raise NotFound(f"there is no backend {name!r} in the {place}; there are: {names or 'none'}")
    return known[name]


def named(services: Services) -> list[str]:
    """The names and aliases by which backends can be named."""
    found = backends(services)
    return [entry.name for entry in found] + [entry.alias for entry in found if entry.alias]


def external(services: Services) -> list[BackendEntry]:
    """The backends that admins have given the archive of."""
    with services.db.transaction() as db:
        return [BackendEntry.of_record(record) for record in rows.external(db)]


def look(services: Services) -> None:
    """Wait until each gallery was read once, so that `builds` knows of all."""
    _galleries(services)


def read_anew(services: Services) -> None:
    """Wait until each gallery was read, however fresh it is."""
    for _, gallery in _galleries(services, wait=False):
        gallery.look_now(services.settings)


def builds(services: Services) -> dict[str, Collection[Build]]:
    """What backends are made for, by their names, as far as galleries have been read: this waits for nothing.

    Those that admins have given the archive of are not among them: they are for the processor.
    """
    found = _firsts([(BUILTIN, entry) for entry in catalog.catalog().backends], _of_galleries(services, wait=False))
    return {entry.name: entry.builds.keys() for _, entry in found}


def comes_with_us(name: str) -> bool:
    """Whether a backend of that name is one of this version, so that nodes have its entry themselves."""
    return any(entry.name == name for entry in catalog.catalog().backends)


def record(services: Services, name: str) -> dict[str, Any] | None:
    """The entry of a backend, as it goes with a job; None for one of this version."""
    if comes_with_us(name):
        return None
    return next((entry.record for entry in backends(services) if entry.name == name), None)


def shown(services: Services) -> list[dict[str, Any]]:
    """Each gallery: its name, where it is, what it lists, and why it could not be read the last time."""
    return [
        {"name": name, "url": gallery.place, "backends": [entry.name for entry in gallery.entries],
         "error": gallery.error or None}
        for name, gallery in _galleries(services)
    ]  # fmt: skip


def models(services: Services) -> list[tuple[str, AnyModel]]:
    """Every model that can be installed, after the name of its gallery; those of this version first."""
    own: list[tuple[str, AnyModel]] = [(BUILTIN, entry) for entry in catalog.catalog().models]
    return own + [(name, entry) for name, gallery in _model_galleries(services) for entry in gallery.entries]


def model(services: Services, wanted: str) -> AnyModel:
    """The model of that name, or of `gallery@name`.

    Raises:
        NotFound: there is none.
    """
    gallery, _, name = wanted.rpartition("@")
    for where, entry in models(services):
        if entry.name == name and gallery in ("", where):
            return entry
    raise NotFound(f"There is no model '{wanted}' in the galleries. 'localai-q models available' shows them.")


def shown_models(services: Services) -> list[dict[str, Any]]:
    """Each gallery of models: its name, where it is, how many it lists, and why it could not be read the last time."""
    return [
        {"name": name, "url": gallery.place, "models": len(gallery.entries), "error": gallery.error or None}
        for name, gallery in _model_galleries(services)
    ]


def _model_galleries(services: Services) -> list[tuple[str, Gallery[AnyModel]]]:
    named = services.settings.model_galleries
    with _lock:
        found = [(name, _of_models.setdefault(url, Gallery(url, catalog.read_models))) for name, url in named.items()]
    for _, gallery in found:
        gallery.look(services.settings)
    return found


def _read_backends(text: str, place: str) -> tuple[tuple[BackendEntry, ...], str]:
    return catalog.read_gallery(text, place), ""


def _galleries(services: Services, *, wait: bool = True) -> list[tuple[str, Gallery[BackendEntry]]]:
    named = services.settings.named_backend_galleries
    with _lock:
        found = [(name, _of_backends.setdefault(url, Gallery(url, _read_backends))) for name, url in named.items()]
    for _, gallery in found:
        gallery.look(services.settings, wait=wait)
    return found


def _of_galleries(services: Services, *, wait: bool = True) -> list[tuple[str, BackendEntry]]:
    """What the galleries list."""
    return [(name, entry) for name, gallery in _galleries(services, wait=wait) for entry in gallery.entries]


def _firsts(*lists: Iterable[tuple[str, BackendEntry]]) -> list[tuple[str, BackendEntry]]:
    """All of these; of two backends that have one name the first."""
    found: dict[str, tuple[str, BackendEntry]] = {}
    for where, entry in chain(*lists):
        found.setdefault(entry.name, (where, entry))
    return list(found.values())


def read_text(place: str, settings: Settings) -> str:
    """What stands at a path or a URL, within the bounds that sources of models have.

    Raises:
        InvalidValue: it is no text, too long, or where nobody may be led.
        Unavailable: it cannot be read.
    """
    github = GITHUB.fullmatch(place)
    place = f"https://raw.githubusercontent.com/{github[1]}/{github[3]}/{github[2]}" if github else place
    try:
        return (_from_file(Path(place)) if place.startswith("/") else _from_web(place, settings)).decode()
    except UnicodeDecodeError as error:
        raise InvalidValue("it is no text") from error


def _from_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    if len(text) > LARGEST:
        raise InvalidValue(f"{path} has more than {LARGEST >> 20} MiB")
    return text


def network(settings: Settings) -> Network:
    """The network as the API may use it: it leads to no address of the cluster."""
    urls = tuple(each for each in (settings.redis_url, settings.database_url, settings.base_url) if each)
    return Network(allow_private=settings.allow_private_sources, cluster_urls=urls)


def _from_web(url: str, settings: Settings) -> bytes:
    try:
        response, body = network(settings).read(url)
    except httpx.HTTPError as error:
        raise Unavailable(f"cannot read {url}: {error}") from error
    if response.status_code != httpx.codes.OK:
        raise Unavailable(f"{url} answers with status {response.status_code}")
    return body
