"""What `make run` says where it cannot go on: one line that names the fix, and what make itself adds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localai_q import ports

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("Makefile", "setup.cfg", "setup.py", "requirements.txt")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh checkout, as far as make looks at it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in NEEDED:
        shutil.copy(ROOT / name, folder)
    return folder


def python(folder: Path, script: str) -> str:
    """A program that stands where a Python would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def said(checkout: Path, *arguments: str, **settings: str) -> str:
    """The one line that a failing `make run` gives as its reason."""
    done = subprocess.run(
        ["make", "run", *arguments],
        cwd=checkout, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "*** [" not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_python_that_is_too_old_is_named_with_the_fix(checkout: Path) -> None:
    old = python(checkout, 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    line = said(checkout, f"PYTHON={old}")
    assert "Python 3.9.2 is too old: install Python 3.11 or newer" in line
    assert "PYTHON=" in line


def test_a_python_that_is_not_there_is_named_with_the_fix(checkout: Path) -> None:
    assert "there is no nothing-like-python: install Python 3.11" in said(checkout, "PYTHON=nothing-like-python")


def test_a_python_without_venv_is_named_with_the_fix(checkout: Path) -> None:
    bare = python(checkout, 'case "$2" in *venv*) exit 1;; *) exit 0;; esac')
    assert "lacks venv or ensurepip" in (line := said(checkout, f"PYTHON={bare}"))
    assert "apt install python3-venv" in line


def test_a_folder_that_cannot_be_written_is_named(checkout: Path) -> None:
    (checkout / ".venv").write_text("in the way")
    line = said(checkout, f"PYTHON={sys.executable}")
    assert "cannot make .venv (" in line
    assert "in a folder that you can write" in line


def test_without_a_network_it_says_so_and_a_later_try_goes_on(checkout: Path) -> None:
    nobody = f"http://127.0.0.1:{ports.choose()}/simple"
    settings = {"PIP_INDEX_URL": nobody, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    for _ in range(2):
        line = said(checkout, f"PYTHON={sys.executable}", **settings)
        assert "it needs a network to PyPI, or PIP_INDEX_URL naming a mirror" in line
        assert ".venv/install.log" in line
    assert not (checkout / ".venv" / ".installed").exists()
