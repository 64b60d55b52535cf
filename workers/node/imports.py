"""The GGUF files of folders that this node's own setting names: found, described, and brought into its store.

Nothing outside of these folders is looked at, whatever a job asks for. What a symbolic link leads to counts where it
lies; links to folders are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localai_q import gguf
from localai_q.cluster import parts
from localai_q.errors import Forbidden, InvalidValue, LocalAIError

MOST_FILES = 500  # in one list
MOST_ENTRIES = 100_000  # of folders that are looked at
DEEPEST = 8  # folders below one another


def allowed(path: str, folders: Sequence[Path]) -> Path:
    """Where a path leads to, if that lies in one of the folders.

    Raises:
        Forbidden: it does not.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in folders):
        named = ", ".join(map(str, folders)) or "none"
        raise Forbidden(f"{path} is in none of the folders that LOCALAI_Q_IMPORT_FOLDERS of this node allows: {named}")
    return real


def listed(folder: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The GGUF files below a folder, or with an empty one below all that are allowed.

    Returns `{"folders": [str], "files": [{"path", "size", "facts", "refused"}], "left_out": int}`: `refused` is why a file
    cannot be a model, else null; a model in several files is listed once, with its first, and the size of all. `left_out`
    counts what was beyond the limits.

    Raises:
        Forbidden: the folder is in none that is allowed.
        InvalidValue: there is no such folder.
    """
    roots = [allowed(folder, folders)] if folder else [Path(os.path.realpath(each)) for each in folders]
    if folder and not roots[0].is_dir():
        raise InvalidValue(f"this node has no folder {folder}", param="folder")
    found = {path for root in roots for path in _below(root, folders)}
    shown = sorted(path for path in found if str(path).isprintable() and not _is_behind(path, found))
    files = [_described(path, folders) for path in shown[:MOST_FILES]]
    return {"folders": [str(each) for each in folders], "files": files, "left_out": max(len(shown) - MOST_FILES, 0)}


def importable(path: str, folders: Sequence[Path]) -> list[Path]:
    """The files of a model whose first, or only one, has this path, if they can be one.

    Raises:
        Forbidden: one is in no folder that is allowed.
        InvalidValue: one is not there, or they are no whole GGUF files of one model.
    """
    files = _files(path, folders)
    gguf.read_facts(*files)
    return files


def _files(path: str, folders: Sequence[Path]) -> list[Path]:
    """Where the files of a model lie whose first has this path."""
    found = []
    for each in parts.every(path):
        real = allowed(each, folders)
        if not real.is_file():
            raise InvalidValue(f"this node has no file {each}", param="files")
        found.append(real)
    return found


def _below(root: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """Files of the right name; those that links lead to where they may."""
    left = MOST_ENTRIES
    for place, below, names in os.walk(root):
        left -= len(names) + len(below)
        if left < 0 or len(Path(place).relative_to(root).parts) >= DEEPEST:
            below.clear()
        for name in names:
            path = Path(place) / name
            if name.lower().endswith(".gguf") and path.is_file() and _is_allowed(path, folders):
                yield path
        if left < 0:
            return


def _is_allowed(path: Path, folders: Sequence[Path]) -> bool:
    try:
        return bool(allowed(str(path), folders))
    except Forbidden:
        return False


def _described(path: Path, folders: Sequence[Path]) -> dict[str, Any]:
    known: dict[str, Any] = {"path": str(path), "size": 0, "facts": None, "refused": None}
    try:
        known["size"] = path.stat().st_size
        facts = gguf.read_facts(*_files(str(path), folders))
        return {**known, "size": facts.file_size, "facts": asdict(facts)}
    except LocalAIError as error:
        return {**known, "refused": error.message}
    except OSError as error:
        return {**known, "refused": str(error.strerror)}


def _is_behind(path: Path, found: Set[Path]) -> bool:
    """Whether it is one of several files, of which the first was found."""
    part = parts.part(str(path))
    return part is not None and part.number > 1 and Path(part.beside(1)) in found
