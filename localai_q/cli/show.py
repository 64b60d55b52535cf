"""How the command line shows what others have said: a table for people, JSON for scripts, texts as they are but harmless."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from localai_q.cluster.joblog import shown

PIPED_WIDTH = 240  # columns of a table that no terminal shows, so that lines can be searched and pasted
WHOLE = ("id", "name")  # columns that are pasted into the next command
NARROWEST = 8  # columns that any other is given, even if the terminal then breaks the lines

_OBEYED = {
    **dict.fromkeys([*range(ord(" ")), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "\N{REPLACEMENT CHARACTER}"),
    ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None,
}  # fmt: skip  # controls, and halves of characters, which cannot be printed

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def rows(records: Iterable[dict[str, Any]], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """Print records: the named columns as a table, or everything as JSON."""
    listed = list(records)
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    if not listed:
        print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    needed = 0
    for column in columns:
        longest = max(len(text(record.get(column))) for record in listed) if column in WHOLE else None
        needed += (longest or NARROWEST) + len("  ")
        overflow: Literal["ignore", "fold"] = "ignore" if longest else "fold"
        table.add_column(_title(column), overflow=overflow, no_wrap=bool(longest), min_width=longest)
    for record in listed:
        table.add_row(*(text(record.get(column)) for column in columns))
    width = Console().width if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=max(width, needed), markup=False).print(table)


def _title(column: str) -> str:
    return column.upper().replace("_", " ")


def text(value: Any) -> str:
    """A value as a cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return shown(str(value))


def prose(said: str) -> str:
    """A text of several lines, or a piece of one, without what a terminal would obey."""
    return said.translate(_OBEYED)


def when(seconds: float | None) -> str | None:
    """A time since the epoch, as local time."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S") if seconds else None
