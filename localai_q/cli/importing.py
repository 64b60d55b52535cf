"""From the files that a node has found in its folders to models: which, and how they are called."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import PurePosixPath

from rich.filesize import decimal

from localai_q.cli.client import Api, Record
from localai_q.cli.jobs import POLL, need_done, wait
from localai_q.cluster import parts
from localai_q.errors import InvalidValue, LocalAIError, Unavailable

SEEN_WITHIN = 120.0  # seconds in which a node reports what it has


def choose(files: Sequence[Record], *, everything: bool, only: Sequence[str]) -> list[Record]:
    """The files that models are to be made of.

    Raises:
        InvalidValue: a file that was named is not there, is there twice, or cannot be a model.
    """
    if everything:
        return [file for file in files if not file["refused"]]
    chosen = []
    for wanted in only:
        found = [file for file in files if wanted in (file["path"], PurePosixPath(file["path"]).name)]
        if len(found) != 1:
            raise InvalidValue(f"there are {len(found)} files {wanted!r}: 'localai-q models import-folder' lists them")
        if found[0]["refused"]:
            raise InvalidValue(f"{found[0]['path']} cannot be a model: {found[0]['refused']}")
        chosen += found
    return chosen


def add(api: Api, node: str, files: Sequence[Record], backend: str, *, quiet: bool) -> list[Record]:
    """Have the node take the files in, and add a model for each; what became of each.

    Raises:
        LocalAIError: none of them could be added.
    """
    job = api.call("POST", "/api/nodes/{}/files/import", node, json={"files": [file["path"] for file in files]})["job"]
    brought = need_done(wait(api, job, quiet=quiet))["result"]["files"]
    found = [content for file in brought if not file["refused"] for content in (file, *file["further"])]
    _wait_until_seen(api, node, {content["sha256"] for content in found})
    added = [_added(api, file, backend) for file in brought]
    if all(each["error"] for each in added):
        raise LocalAIError(f"no model was added: {added[0]['error']}")
    return added


def shown(file: Record) -> Record:
    """A file as a row of a table."""
    facts = file["facts"] or {}
    return {**file, "size": decimal(file["size"]), "architecture": facts.get("architecture"),
            "context": facts.get("context_length")}  # fmt: skip


def name_of(path: str) -> str:
    """What a model of this file is called."""
    name = parts.whole(PurePosixPath(path).name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition(".")[0]).lstrip("._-")
    return stem[:128] or "model"


def _added(api: Api, file: Record, backend: str) -> Record:
    """The file's model, which no other node needs to have at that path: they get it by its content."""
    name, error = name_of(file["path"]), file["refused"]
    if not error:
        body = {"name": name, "backend": backend, "source": f"file:{file['path']}", "sha256": file["sha256"],
                "size": file["size"], "parts": file["further"]}  # fmt: skip
        try:
            api.call("POST", "/api/models", json=body)
        except LocalAIError as refusal:
            error = refusal.message
    return {"name": name, "path": file["path"], "sha256": file.get("sha256"), "error": error}


def _wait_until_seen(api: Api, node: str, contents: set[str]) -> None:
    """Let the node report the files before a model names them, so that others know from whom to have them."""
    until = time.monotonic() + SEEN_WITHIN
    while not contents <= set(api.call("GET", "/api/nodes/{}", node)["hardware"].get("files") or ()):
        if time.monotonic() > until:
            raise Unavailable(f"node {node} has the files, and has not said so within {SEEN_WITHIN:.0f} s")
        time.sleep(POLL)
