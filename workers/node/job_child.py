"""The process in which one long job runs: `python -m workers.node.job_child`. Says its progress and its end in a pipe.

It holds no lease and knows no queue; whoever started it does. To stop it, kill its session. When whoever started it ends,
it does that itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from localai_q import gguf
from localai_q.cluster import parts
from localai_q.cluster.disk import Blob, surplus
from localai_q.cluster.events import Progress
from localai_q.config import settings
from localai_q.errors import InvalidValue, LocalAIError, StartupError, to_record
from localai_q.gallery import catalog
from localai_q.processes import kill_session, watch_parent
from workers import versions
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node import hardware, imports, quantizer
from workers.node.api import NodeApi
from workers.node.downloads import Report as Reading
from workers.node.downloads import hash_file
from workers.node.fetcher import Wanted, discard, fetch, fetch_all, wanted_of
from workers.node.installer import Kit, install_backend, is_installed
from workers.node.sources import Access
from workers.node.store import Store
from workers.node.wheels import Wheels

log = logging.getLogger(__name__)

Report = Callable[[Progress], None]

ARCHIVE = ".archive"  # folder of what a backend is unpacked from, in that of the backend


class JobOrder(BaseModel):
    """What the child is to do, and where it is to speak."""

    model_config = ConfigDict(frozen=True)

    spec: ChildSpec
    request: dict[str, Any]
    fd: int


def install(order: JobOrder, report: Report) -> dict[str, Any]:
    """Install a backend; the result is what it is."""
    return _installed_by(order, report, force=False)


def upgrade(order: JobOrder, report: Report) -> dict[str, Any]:
    """Make a backend anew, of the newest that its entry names; the result is what it is."""
    return _installed_by(order, report, force=True)


def delete(order: JobOrder, report: Report) -> dict[str, Any]:
    """Remove a backend. What runs of it runs on."""
    name = checked_name(str(order.request["backend"]))
    removed = versions.remove(order.spec.backends, name)
    shutil.rmtree(order.spec.backends / name / ARCHIVE, ignore_errors=True)  # of an install that failed
    return {"name": name, "removed": removed}


def _installed_by(order: JobOrder, report: Report, *, force: bool) -> dict[str, Any]:
    spec, entry = order.spec, entry_of(order.request)
    access = Access.of(settings(), spec)

    def bring(archive: catalog.Archive) -> Path:
        wanted = Wanted(source=archive.source, sha256=archive.sha256)
        return fetch(wanted, spec.backends / entry.name / ARCHIVE, access, report)

    found = devices(spec)
    wheels = Wheels(access, cpus=found.get("cpus", 1), progress=report, models=spec.models, backend=entry.name)
    kit = Kit(hardware=found, indexes=settings().backend_indexes, fetch=bring, wheel=wheels.bring)
    install_backend(entry, spec.backends, report, kit, force=force)
    return _present(spec, entry)


def entry_of(request: dict[str, Any]) -> catalog.BackendEntry:
    """The entry that a job is about: as it comes with the job, for one of a gallery, else this version's own.

    Raises:
        InvalidValue: what comes is no entry.
        NotFound: this version has none of that name.
    """
    given = request.get("entry")
    if given is None:
        return catalog.backend(str(request["backend"]))
    try:
        return catalog.BackendEntry.of_record(given)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InvalidValue(f"the entry of backend {request['backend']} cannot be read: {reason}") from error


def checked_name(text: str) -> str:
    """The name of a backend, which is the name of a folder, too; `InvalidValue` if it is none."""
    try:
        return TypeAdapter(catalog.Name).validate_python(text)
    except ValidationError as error:
        raise InvalidValue(f"{text!r} is no name of a backend") from error


def devices(spec: ChildSpec) -> dict[str, Any]:
    """The hardware of this machine."""
    return hardware.read(spec.models, lambda total: total, settings().builds)


def _present(spec: ChildSpec, entry: catalog.BackendEntry) -> dict[str, Any]:
    found = versions.current(spec.backends, entry.name)
    return asdict(found) if found else {}


def fetch_model(order: JobOrder, report: Report) -> dict[str, Any]:
    """Fetch a model's files; the result names their contents."""
    spec = order.spec
    access = Access.of(settings(), spec)
    came = fetch_all(all_wanted(order.request), spec.models, access, lambda progress, _: report(progress))
    return described(came, parts_of(order.request))


def parts_of(request: dict[str, Any]) -> int:
    """How many of the further files of a job's request are the model's own, which is in several."""
    found = request.get("parts")
    return found if isinstance(found, int) else 0


def all_wanted(request: dict[str, Any]) -> list[Wanted]:
    """All files that a job's request asks for, the model's own first."""
    further = request.get("further")
    return [wanted_of(request), *map(wanted_of, further if isinstance(further, list) else [])]


def clean_models(order: JobOrder, report: Report) -> dict[str, Any]:
    """Remove files that no model names; the result lists them."""
    request, spec = order.request, order.spec
    store = Store(spec.models)
    api = NodeApi(spec.api_url, spec.node_id, Identity(spec.identity))
    grace, floor, dry_run = float(request["grace"]), int(request["floor"]), bool(request["dry_run"])

    names: list[str] = []

    def ask() -> list[str]:
        names.extend(api.unnamed())
        return names

    def choose(found: list[Blob]) -> list[Blob]:
        return surplus(found, grace=grace, free=store.free(), floor=floor)

    removed = store.clean(ask, choose, dry_run=dry_run)
    kept = sorted(set(names) - {blob.sha256 for blob in removed})
    freed = sum(blob.size for blob in removed)
    return {"removed": [asdict(blob) for blob in removed], "kept": kept, "freed": freed, "dry_run": dry_run}


def quantize(order: JobOrder, report: Report) -> dict[str, Any]:
    """Make a quantized file; the result is what it is, and what making it has cost."""
    spec = order.spec
    return quantizer.quantize(order.request, spec.models, spec.backends, Access.of(settings(), spec), report)


def check_file(order: JobOrder, report: Report) -> dict[str, Any]:
    """Read a file that another node had wrong bytes of; remove it if it is wrong. The result says what was found."""
    store, sha256 = Store(order.spec.models), str(order.request["sha256"])
    path = store.find(sha256)
    if path is None:
        return {"sha256": sha256, "found": None, "removed": False}
    with store.alone(sha256, report) as tell, path.open("rb") as file:
        digest = hash_file(file, path.stat().st_size, Reading(tell))
        return {"sha256": sha256, "found": digest.sha256, "removed": store.mend(sha256, digest)}


def scan_files(order: JobOrder, report: Report) -> dict[str, Any]:
    """List the GGUF files of a folder that this node's setting allows."""
    return imports.listed(str(order.request.get("folder") or ""), import_folders(order.spec))


def import_files(order: JobOrder, report: Report) -> dict[str, Any]:
    """Bring files of such folders into the store; the result says of each what it is, or why it was refused."""
    spec, folders = order.spec, import_folders(order.spec)
    access = replace(Access.of(settings(), spec), peers=None)
    found: list[dict[str, Any]] = []
    for path in map(str, order.request["files"]):
        try:
            with imports.importable(path, folders) as files:
                wanted = [Wanted(source=f"file:{file.name}") for file in files]
                came = fetch_all(wanted, spec.models, access, lambda progress, _: report(progress), opened=files)
            found.append({"path": path, **described(came, len(came) - 1), "refused": None})
        except LocalAIError as error:
            found.append({"path": path, "refused": error.message})
        except OSError as error:
            found.append({"path": path, "refused": f"it cannot be read: {error.strerror or error}"})
    return {"files": found}


def import_folders(spec: ChildSpec) -> list[Path]:
    """The folders that files may be imported from."""
    return [*settings().import_places, spec.models]


def described(files: Sequence[Path], parts: int = 0) -> dict[str, Any]:
    """Fetched files as the result of their job: what they are, and what the model's own say of its memory.

    Args:
        files: the model's own first, so many `parts` of it then.

    Raises:
        InvalidValue: its parts are not those of one model.
    """
    content, *others = ({"sha256": path.name, "size": path.stat().st_size} for path in files)
    return {**content, "facts": facts_of(*files[: parts + 1]), "further": others}


def facts_of(path: Path, *parts: Path) -> dict[str, Any] | None:
    """What the header says; None of a file in another format, or damaged: that is for the engine to refuse.

    Raises:
        InvalidValue: of several files one is damaged, or of another model.
    """
    try:
        return asdict(gguf.read_facts(path, *parts))
    except InvalidValue as error:
        if parts:
            raise
        log.info("%s: %s", path, error.message)
        return None


KINDS: dict[str, Callable[[JobOrder, Report], dict[str, Any]]] = {
    "install_backend": install,
    "upgrade_backend": upgrade,
    "delete_backend": delete,
    "fetch_model": fetch_model,
    "clean_models": clean_models,
    "quantize": quantize,
    "check_file": check_file,
    "scan_files": scan_files,
    "import_files": import_files,
}


def installed(spec: ChildSpec, request: dict[str, Any]) -> dict[str, Any] | None:
    """The result of `install`, if there is nothing left to do."""
    entry = entry_of(request)
    return _present(spec, entry) if is_installed(entry, spec.backends, devices(spec)) else None


def fetched(spec: ChildSpec, request: dict[str, Any]) -> dict[str, Any] | None:
    """The result of `fetch_model`, if there is nothing left to do."""
    store = Store(spec.models)
    found = [store.find(str(wanted.sha256)) for wanted in all_wanted(request)]
    there = [path for path in found if path]
    return described(there, parts_of(request)) if len(there) == len(found) else None


def discard_fetched(spec: ChildSpec, request: dict[str, Any]) -> None:
    """Remove what a fetch has left that was cancelled; what is whole stays until it is cleaned."""
    for wanted in all_wanted(request):
        discard(wanted, spec.models)


def discard_imported(spec: ChildSpec, request: dict[str, Any]) -> None:
    """Remove what an import has left that was cancelled."""
    for first in map(str, request["files"]):
        with suppress(InvalidValue):
            for path in parts.every(first):
                discard(Wanted(source=f"file:{os.path.realpath(path)}"), spec.models)


PRESENT: dict[str, Callable[[ChildSpec, dict[str, Any]], dict[str, Any] | None]] = {
    "install_backend": installed,
    "fetch_model": fetched,
}

# What a job leaves that was cancelled, and that nobody will go on with.
DISCARD: dict[str, Callable[[ChildSpec, dict[str, Any]], None]] = {
    "install_backend": lambda spec, request: versions.tidy(spec.backends),
    "upgrade_backend": lambda spec, request: versions.tidy(spec.backends),
    "fetch_model": discard_fetched,
    "quantize": lambda spec, request: quantizer.discard(request, spec.models),
    "import_files": discard_imported,
}


def _end() -> None:
    """End this process with all that it has started."""
    kill_session(os.getsid(0))


def main() -> None:
    """Do what the order says."""
    path = settings().child_spec
    if path is None:
        raise SystemExit("this is a part of a node, which starts it")
    signal.signal(signal.SIGTERM, lambda *_: _end())
    watch_parent(os.getppid(), _end)
    order = JobOrder.model_validate_json(path.read_text())
    path.unlink()

    lock = threading.Lock()  # a long line is not written at once

    def say(**message: Any) -> None:
        with lock:
            os.write(order.fd, (json.dumps(message) + "\n").encode())

    try:
        work = KINDS.get(str(order.request.get("kind")))
        if work is None:
            raise InvalidValue(f"this node does not know jobs of the kind {order.request.get('kind')!r}")
        say(result=work(order, lambda progress: say(progress=asdict(progress))))
    except LocalAIError as error:
        say(error=to_record(error))
    except Exception as error:
        log.exception("the job failed")
        say(error=to_record(StartupError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    main()
