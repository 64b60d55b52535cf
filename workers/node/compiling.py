"""Compiles a package that comes as source only into a wheel. Where wheels are kept is left to `workers.node.wheels`.

All of it happens below one folder, the caches of the tools too, so that who removes that leaves nothing. It runs at low
priority, and in the session of this process: whoever kills that (`localai_q.processes.kill_group`) ends all of it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from localai_q.cluster.builds import Build
from localai_q.cluster.events import Progress
from localai_q.config import child_environment
from localai_q.errors import Unavailable
from localai_q.gallery.catalog import CompiledPackage
from workers.node.downloads import Report, download
from workers.node.installer import LINE_EVERY, LONGEST_NOTE, run_uv
from workers.node.sources import Access
from workers.node.sources.wheels import sdist
from workers.node.store import Store

STAGE = "compiling"
COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}  # by the variable that names another one
NVCC = "/usr/local/cuda/bin/nvcc"  # where NVIDIA's packages put it
# Settings of compilers in the environment would make another wheel than the one that the entry describes.
OTHERS_FLAGS = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS",
                "SKBUILD_CMAKE_DEFINE", "CMAKE_GENERATOR", "ARCHFLAGS")  # fmt: skip

_SOURCE = re.compile(r" -c (?:\S+/)?([^\s/]+)$")  # of a compiler's whole command line, which would hide it
_STEP = re.compile(r"^\s*\[\s*(\d+)/(\d+)\]\s*(.*)")  # as ninja counts


def compile_wheel(
    package: CompiledPackage, build: Build, folder: Path, access: Access, *, cpus: int, what: str,
    progress: Callable[[Progress], None],
) -> Path:  # fmt: skip
    """Compile a package; the wheel, below `folder`.

    Args:
        folder: of this alone; it holds much that is of no use any more afterwards.
        cpus: how many compilers may run at once.
        what: the beginning of an error.
        progress: told of "downloading" in bytes, and of "compiling", in steps where the package counts them.

    Raises:
        Unavailable: it cannot be compiled here; one line says why.
    """
    need_compilers(package, build, what)
    folder.mkdir(parents=True)
    archive = _source(package, folder, access, progress)
    out, lines = folder / "out", _Lines(progress)
    options = [f"--config-setting={name}={value}" for name, value in sorted(package.settings.items())]
    command = ["build", "--wheel", "--out-dir", str(out), "--python", sys.executable, *options, str(archive)]
    (folder / "tmp").mkdir()
    changes = {"UV_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder / "tmp"),
               "CMAKE_BUILD_PARALLEL_LEVEL": str(cpus), **dict.fromkeys(OTHERS_FLAGS, "")}  # fmt: skip
    lines.line(f"compiling {package.requirement}")
    run_uv(command, folder, f"{what}: {package.requirement} cannot be compiled", lines.line, changes=changes, idly=True)
    return next(out.glob("*.whl"))


def _source(package: CompiledPackage, folder: Path, access: Access, progress: Callable[[Progress], None]) -> Path:
    """The archive of the package's source."""
    origin = sdist(package.name, package.version)
    url = origin.urls[0]
    archive = folder / unquote(urlsplit(url).path).rpartition("/")[2]
    if url.startswith("file:"):
        return shutil.copyfile(httpx.URL(url).path, archive)
    most, room = access.settings.max_upload, Store(folder).need_room
    download(origin, archive, access.network(), Report(progress), lambda size: room(size, folder), most=most)
    return archive


def need_compilers(package: CompiledPackage, build: Build, what: str) -> None:
    """Refuse what this machine has no compilers for.

    Raises:
        Unavailable: one is missing; the message says which, and how to get it.
    """
    missing = f"{what}: {package.requirement} comes as source only, and this machine has no"
    if not all(_is_there(variable, *names) for variable, names in COMPILERS.items()):
        raise Unavailable(
            f"{missing} C++ compiler: 'apt install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora), "
            "'xcode-select --install' (macOS)"
        )
    if build.startswith("cuda") and not _is_there("CUDACXX", "nvcc", NVCC):
        raise Unavailable(f"{missing} nvcc: install NVIDIA's CUDA toolkit {build.removeprefix('cuda')}")


def _is_there(variable: str, *names: str) -> bool:
    """Whether the program that a variable names, or else one of these, can be run."""
    environment = child_environment()
    named = shlex.split(environment.get(variable, ""))[:1]
    return any(shutil.which(name, path=environment.get("PATH")) for name in named or names)


@dataclass
class _Lines:
    """Makes what a builder says into progress: each step that it counts, and of the rest a line from time to time."""

    progress: Callable[[Progress], None]
    done: int = 0
    total: int = 0
    next_line: float = 0.0

    def line(self, text: str) -> None:
        if found := _STEP.match(text):
            self.done, self.total = int(found[1]), int(found[2])
            source = _SOURCE.search(text)
            text = source[1] if source else found[3]
        elif not text.strip() or time.monotonic() < self.next_line:
            return
        self.next_line = time.monotonic() + LINE_EVERY
        note = text.strip()[:LONGEST_NOTE]
        self.progress(Progress(stage=STAGE, done=self.done, total=self.total, unit="steps", note=note))
