"""A backend that an admin gives the archive of: installed, named by its alias, asked, and deleted again."""

import hashlib
import tarfile
from pathlib import Path

from e2e_cluster import Cluster, until
from waiting import LIMIT


def pack(path: Path, engine: Path) -> str:
    """An archive with a `run.sh` that becomes the server of an installed engine; its SHA-256."""
    script = path.with_name("run.sh")
    script.write_text(f'#!/bin/sh\ncd "{engine}" && exec venv/bin/python server.py "$@"\n')
    script.chmod(0o755)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(script, "run.sh")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_is_served_by_an_archive_that_an_admin_has_given(calm: Cluster, tmp_path: Path) -> None:
    (engine,) = calm.home.glob("**/backends/echo/current")
    given = ("--uri", f"file:{tmp_path}/own.tgz", "--sha256", pack(tmp_path / "own.tgz", engine.resolve()))
    assert "done" in calm.cli("backends", "install", "own", "--all", *given, "--alias", "ours")
    file = ("--source", f"file:{tmp_path}/own.tgz", "--sha256", given[-1])  # this engine needs none, and takes any
    calm.cli("models", "add", "spoken", *file, "--backend", "ours")
    assert "two words" in calm.say("two words", "spoken").choices[0].message.content
    calm.cli("models", "remove", "spoken")
    calm.cli("backends", "delete", "own", "--all")
    until(lambda: " own " not in calm.cli("backends", "list"), LIMIT, "a report without the backend")
    assert " own " not in calm.cli("backends", "list", "--available")
