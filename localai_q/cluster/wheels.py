"""Which wheel of a compiled package fits which machine: one that was made of the same, for the same. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from localai_q.cluster.builds import Build
from localai_q.errors import Unavailable

Level = Literal["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"]
LEVELS: tuple[Level, ...] = get_args(Level)
X86 = ("x86_64", "amd64")

# What the x86-64 psABI asks of each level beyond the one before, in Linux' names; what it leaves out says little here.
_FLAGS: dict[Level, frozenset[str]] = {
    "x86-64-v2": frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
    "x86-64-v3": frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
}

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]{0,128}$")]


class Machine(BaseModel):
    """What a machine compiles for."""

    model_config = ConfigDict(frozen=True)

    python: _Word  # its most specific tag, as "cp311-cp311-linux_x86_64"
    libc: _Word  # as "glibc-2.36"; empty where there is one only
    arch: _Word  # as Python's platform.machine() has it
    level: Level | None = None  # of x86 processors; None: not known


class WheelKey(BaseModel):
    """All that tells one wheel from another. Two machines with the same key can use the same wheel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    package: _Word
    version: _Word
    settings: dict[str, str] = Field(max_length=64)
    build: Build  # with which CUDA, among others
    python: _Word
    libc: _Word
    cpu: _Word  # the level of x86 processors that the code is for, or their kind

    @property
    def digest(self) -> str:
        """The key in 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @property
    def filename(self) -> str:
        """A name by which installers take the wheel: one that fits Python and platform of the key."""
        return f"{re.sub('[-_.]+', '_', self.package)}-{self.version}-{self.python}.whl"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A wheel that a node has compiled for others."""

    key: WheelKey
    sha256: str
    size: int  # bytes
    node: str  # the name of the one that gave it
    created: float = 0.0  # seconds since the epoch


def level_of(flags: Collection[str]) -> Level:
    """The highest level of an x86 processor with these features."""
    found: Level = "x86-64"
    for level, needed in _FLAGS.items():
        if not needed.issubset(flags):
            break
        found = level
    return found


def wheel_key(
    package: str, version: str, settings: Mapping[str, str], level: Level | None, build: Build, machine: Machine
) -> WheelKey:
    """The key of what this machine needs.

    Args:
        level: the processors that the settings make code for; None: those of the machine.

    Raises:
        Unavailable: the code would not run on its processor.
    """
    cpu = machine.arch
    if machine.arch in X86:
        if level and machine.level and LEVELS.index(machine.level) < LEVELS.index(level):
            raise Unavailable(
                f"{package} {version} is compiled for processors of the level {level} or newer, "
                f"and this machine's is {machine.level}"
            )
        cpu = level or machine.level or machine.arch
    return WheelKey(package=package, version=version, settings=dict(settings), build=build, python=machine.python,
                    libc=machine.libc, cpu=cpu)  # fmt: skip
