"""Makes a quantized file on this node, and gives it to the API.

Fetches what that needs (`workers.node.fetcher`), checks the source's header (`localai_q.gguf`), has the quantizer of the
backend do the work in a process of its own (`workers/backends/llama_cpp/quantize.py`), keeps the result (`workers.node.store`)
and sends it to the API; an attempt that could not do that is gone on with. Where and when that is done is decided in
`localai_q.cluster.quantizing`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from localai_q import gguf
from localai_q.cluster import parts
from localai_q.cluster.events import Progress
from localai_q.cluster.quantizing import BITS, OTHER_BITS, Options, together
from localai_q.cluster.sources import OnNode, parse
from localai_q.errors import InvalidValue, NotFound, Unavailable
from workers import versions
from workers.node import fetcher
from workers.node.downloads import Report as Bytes
from workers.node.downloads import hash_file
from workers.node.fetcher import wanted_of
from workers.node.installer import python_of
from workers.node.sources import Access
from workers.node.store import QUANTIZED, Store

PROGRAM = "quantize.py"  # in the folder of a backend that can quantize
NEEDED = 60.0  # seconds between two times that the source is said to be needed
PLAIN = frozenset({"f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64"})  # types of tensors that are not quantized

Report = Callable[[Progress], None]


def quantize(request: dict[str, Any], models: Path, backends: Path, access: Access, report: Report) -> dict[str, Any]:
    """Do what the request of a job says; the result as `Quantization.result` keeps it.

    Args:
        models: the folder of all models of this node.
        backends: the folder of all backends.

    Raises:
        InvalidValue: the source is no GGUF file, or is quantized already and may not be.
        Unavailable: it cannot be fetched, made, loaded or given to the API.
    """
    return _Work(request, models, backends, access, report).result()


def discard(request: dict[str, Any], models: Path) -> None:
    """Remove what a quantization that was cancelled has left, with what has come of the files that it needs."""
    Store(models).discard(str(request["quantization"]))
    for file in (*_parts(request["source"]), request["text"], request["options"].get("imatrix")):
        if file:
            fetcher.discard(wanted_of(file), models)


class _Work:
    """One quantization on its way."""

    def __init__(self, request: dict[str, Any], models: Path, backends: Path, access: Access, report: Report) -> None:
        self._request = request
        self._models = models
        self._backends = backends
        self._access = access
        self._report = report
        self._store = Store(models, access.settings.disk_spare)
        self._id = str(request["quantization"])
        self._options = Options.model_validate(request["options"])

    def result(self) -> dict[str, Any]:
        note = self._store.part(self._id, "made.part")
        made = self._made_before(note)
        if made is None:
            made = self._made()
            note.write_text(json.dumps(made))
        self._give(made)
        note.unlink(missing_ok=True)
        return made

    def _made_before(self, note: Path) -> dict[str, Any] | None:
        """What an attempt has made here that could not give it to the API."""
        try:
            made: dict[str, Any] = json.loads(note.read_text())
            return made if self._store.find(made["sha256"]) else None
        except (OSError, ValueError):
            return None

    def _made(self) -> dict[str, Any]:
        """Make the file and keep it; the result."""
        source = self._source()
        before = _checked(source, self._options)
        text = self._fetched(self._request["text"]) if self._request["text"] else None
        imatrix = self._fetched(self._options.imatrix.model_dump()) if self._options.imatrix else None
        part = self._store.part(self._id, QUANTIZED)
        with self._store.alone(self._id):
            try:
                bits = BITS.get(self._request["type"], OTHER_BITS)
                self._store.need_room(int(before.parameters * bits / 8))
                measured = self._quantized(source, part, text, imatrix)
                with part.open("rb") as file:
                    found = hash_file(file, part.stat().st_size, Bytes(self._hashing))
                facts = gguf.read_facts(part)
                self._store.keep(part, found.sha256, found.beginnings)
            finally:
                part.unlink(missing_ok=True)
        return {"sha256": found.sha256, "size": found.size, "source_sha256": source[0].name,
                "source_size": sum(file.stat().st_size for file in source), "architecture": facts.architecture,
                **measured}  # fmt: skip

    def _source(self) -> list[Path]:
        """The files of the source."""
        files = _parts(self._request["source"])
        return self._all_fetched(files, lambda said, before: self._report(together(said, before, len(files))))

    def _fetched(self, file: dict[str, Any]) -> Path:
        return self._all_fetched([file], lambda *_: None)[0]

    def _all_fetched(self, files: list[dict[str, Any]], report: Callable[[Progress, int], None]) -> list[Path]:
        wanted = [wanted_of(file) for file in files]
        try:
            return fetcher.fetch_all(wanted, self._models, self._access, report)
        except NotFound as error:
            if any(isinstance(parse(each.source, each.mirrors), OnNode) for each in wanted):
                raise Unavailable(error.message) from error  # another node may have it
            raise

    def _quantized(self, source: list[Path], part: Path, text: Path | None, imatrix: Path | None) -> dict[str, Any]:
        """Have the backend's program make the file and measure it; what it has measured."""
        folder, descriptor = versions.hold(versions.pointer(self._backends, str(self._request["engine"])))
        with ExitStack() as stack:
            stack.callback(os.close, descriptor)
            if not (folder / PROGRAM).is_file() or not python_of(folder).exists():
                raise Unavailable(f"the backend {self._request['engine']} on this node has no quantizer: upgrade it")
            options = self._options.model_dump(mode="json", exclude={"imatrix"}, exclude_defaults=True)
            if imatrix:
                options["imatrix"] = str(imatrix)
            first = stack.enter_context(_beside_each_other(source))
            order = {"source": str(first), "result": str(part), "type": self._request["type"], "options": options,
                     "threads": _threads(int(self._request["threads"])), "text": str(text) if text else None,
                     "embeddings": bool(self._request.get("embeddings")), "pooling": self._request.get("pooling")}  # fmt: skip
            needed = time.monotonic()
            for said in _run([str(python_of(folder)), PROGRAM], folder, order):
                if "progress" in said:
                    self._report(Progress(**said["progress"]))
                if "error" in said:
                    self._store.need_room(0)  # a full disk is not the order's fault
                    kind = Unavailable if said.get("here") else InvalidValue
                    raise kind(f"it cannot be quantized: {said['error']}")
                if "result" in said:
                    return dict(said["result"])
                if time.monotonic() - needed > NEEDED:
                    needed = time.monotonic()
                    for file in source:
                        self._store.find(file.name)
        raise Unavailable("the quantizer has ended without a word")

    def _give(self, made: dict[str, Any]) -> None:
        api, sha256, report = self._access.peers, made["sha256"], Bytes(self._report)
        if api is None:
            raise Unavailable("there is no API to give the file to")
        path = self._store.folder / sha256
        report("uploading", 0, made["size"])
        api.give(self._id, sha256, path, lambda sent: report("uploading", sent, made["size"]))

    def _hashing(self, progress: Progress) -> None:
        self._report(replace(progress, stage="hashing"))


def _parts(source: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of the source of a request."""
    return [source, *source.get("parts", [])]


@contextmanager
def _beside_each_other(files: list[Path]) -> Iterator[Path]:
    """The first of some files, where the library finds the others by their names."""
    if len(files) == 1:
        yield files[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        links = [Path(folder, name) for name in parts.named("source", len(files))]
        for link, file in zip(links, files, strict=True):
            link.symlink_to(file.absolute())
        yield links[0]


def _checked(source: list[Path], options: Options) -> gguf.Tensors:
    """What the tensors of the source are.

    Raises:
        InvalidValue: it is damaged, in parts that are not those of one model, or quantized already though that was not
            allowed.
    """
    gguf.read_facts(*source)
    found = gguf.read_tensors(*source)
    quantized = sorted(set(found.types) - PLAIN)
    if quantized and not options.allow_requantize:
        raise InvalidValue(
            f"The source is quantized already ({', '.join(quantized)}), which loses more than quantizing the original: "
            "give allow_requantize (--allow-requantize) to do it all the same.",
            param="allow_requantize",
        )
    return found


def _threads(most: int) -> int:
    """Cores that nobody has used lately, of so many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, round(cores - os.getloadavg()[0])), most)


def _run(command: list[str], folder: Path, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the program says. It runs in this process's group, and ends when this process does."""
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            yield json.loads(line)
        if code := process.wait():
            raise Unavailable(f"the quantizer ended with exit code {code}")
    except BrokenPipeError as error:
        raise Unavailable(f"the quantizer does not start: exit code {process.wait()}") from error
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
