"""The GGUF files of folders that this node's own setting names: found, described, and brought into its store.

Nothing outside of these folders is looked at, whatever a job asks for. What a symbolic link leads to counts where it
lies; links to folders are not followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from localai_q import gguf
from localai_q.cluster import parts
from localai_q.cluster.models import Facts
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


@contextmanager
def importable(path: str, folders: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """The files of a model whose first, or only one, has this path, open, and named by where they lie.

    What takes such a name meanwhile is not looked at.

    Raises:
        Forbidden: one is in no folder that is allowed.
        InvalidValue: one is not there, or they are no whole GGUF files of one model.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(each, folders)) for each in parts.every(path)]
        _facts(files)
        yield files


def _opened(path: str, folders: Sequence[Path]) -> BinaryIO:
    real = allowed(path, folders)
    within = [folder for folder in map(os.path.realpath, folders) if real.is_relative_to(folder)]
    try:
        file = open(real, "rb", opener=lambda _, flags: _open_below(within[0], real, flags))  # noqa: SIM115
    except OSError as error:
        raise InvalidValue(
            f"this node has no file {path} that it could read: {error.strerror}", param="files"
        ) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidValue(f"{path} is no file", param="files")
    return file


def _open_below(folder: str, path: Path, flags: int) -> int:
    """Open what a path names, step by step from a folder, unless one of the steps has become a link since it was resolved."""
    *below, name = path.relative_to(folder).parts or (".",)
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part, how in [*((each, os.O_RDONLY | os.O_DIRECTORY) for each in below), (name, flags | os.O_NONBLOCK)]:
        try:
            further = os.open(part, how | os.O_NOFOLLOW, dir_fd=found)
        finally:
            os.close(found)
        found = further
    return found


def _facts(files: Sequence[BinaryIO]) -> Facts:
    return gguf.read_facts(*(Path(f"/dev/fd/{file.fileno()}") for file in files))


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
        with importable(str(path), folders) as files:
            facts = _facts(files)
        return {**known, "size": facts.file_size, "facts": asdict(facts)}
    except LocalAIError as error:
        return {**known, "refused": error.message}
    except OSError as error:
        return {**known, "refused": str(error.strerror)}


def _is_behind(path: Path, found: Set[Path]) -> bool:
    """Whether it is one of several files, of which the first was found."""
    part = parts.part(str(path))
    return part is not None and part.number > 1 and Path(part.beside(1)) in found
