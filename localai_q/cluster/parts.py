"""Models in several files, as llama.cpp's `gguf-split` names them: `big-00001-of-00003.gguf` and so on. Pure.

A name, a path and a source are all read in the same way, by how they end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from localai_q.errors import InvalidValue

MOST_FILES = 256  # of one model

_PART = re.compile(r"(.*-)([0-9]{5})(-of-([0-9]{5})\.gguf)((?:[?@].*)?)", re.I)


@dataclass(frozen=True)
class Part:
    """A name of one of several files."""

    number: int  # from 1
    count: int
    before: str  # its number
    after: str

    def beside(self, number: int) -> str:
        """The name of another file of the same model."""
        return f"{self.before}{number:05}{self.after}"


def part(name: str) -> Part | None:
    """What a name says of its file; None of a model in one file."""
    found = _PART.fullmatch(name)
    if found is None or int(found[4]) < 2:
        return None
    return Part(int(found[2]), int(found[4]), found[1], found[3] + found[5])


def every(first: str, *, field: str = "source") -> list[str]:
    """The names of all files of a model, given that of its first, or of its only one. `field`: who has given it.

    Raises:
        InvalidValue: it is the name of another one, or of one of too many.
    """
    found = part(first)
    if found is None:
        return [first]
    if found.number != 1:
        raise InvalidValue(f"{first} is file {found.number} of {found.count} of a model: name the first of them, "
                           f"{found.beside(1)}, and the others come with it.", param=field)  # fmt: skip
    if found.count > MOST_FILES:
        raise InvalidValue(f"{first} is one of {found.count} files of a model, and it can have {MOST_FILES}: merge them with "
                           "llama.cpp's 'llama-gguf-split --merge', and split them into fewer.", param=field)  # fmt: skip
    return [found.beside(number) for number in range(1, found.count + 1)]


def named(stem: str, count: int) -> list[str]:
    """What the files of a model in several are called that an engine is given."""
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def whole(name: str) -> str:
    """What a model in several files would be called if it were one."""
    found = part(name)
    return f"{found.before[:-1]}.gguf" if found else name
