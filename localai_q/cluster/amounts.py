"""Amounts of memory as people write them: 12GiB, 8 GB, 80%, or a number of bytes. Pure."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
FORM = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,3})?) ?([MGT]i?B|B|%|)", re.IGNORECASE)


def amount(text: str) -> str:
    """The text, if it is one; else a `ValueError` with the forms that are."""
    if not FORM.fullmatch(text):
        raise ValueError("needs a number of bytes, or one as in 8GB, 7.5GiB or 50%")
    return text


Amount = Annotated[str, AfterValidator(amount)]


def part_of(total: int, text: str) -> int:
    """The bytes of so many that the text names; all where there are no more, or where it is none."""
    found = FORM.fullmatch(text)
    if found is None:
        return total
    number, unit = float(found[1]), found[2].upper()
    return min(int(total * number / 100) if unit == "%" else int(number * UNITS[unit]), total)
