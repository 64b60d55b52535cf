"""What no request gets of llama.cpp: parameters that would take all memory, and grammars that it would never finish reading.

Pure. Owns these limits, which hold for whatever engine llama.cpp is in. Values that make no sense are left to the engine.
"""

from __future__ import annotations

import re
from typing import Any

import grpc
from serving import Refusal

LONGEST_GRAMMAR = 1 << 20  # characters
DEEPEST_GRAMMAR = 1000  # brackets within each other; each is a further call
MOST_TEXTS = 32  # stages of sampling, and strings at which a repetition may begin anew
LISTS = ("samplers", "dry_sequence_breakers")
LOOKING_BACK = ("repeat_last_n", "dry_penalty_last_n")  # so many tokens are remembered, whether there are some or not
_BOUNDS = re.compile(r"\{\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\}")
# Of a grammar: texts, sets of characters, comments. Whatever is in them repeats nothing.
_OPAQUE = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def limited(fields: dict[str, Any], context_size: int) -> dict[str, Any]:
    """The body, looking no further back than a request can reach.

    Raises:
        Refusal: INVALID_ARGUMENT, it asks for too much.
    """
    if isinstance(fields.get("grammar"), str):
        check_grammar(fields["grammar"])
    for name in LISTS:
        if isinstance(fields.get(name), list) and len(fields[name]) > MOST_TEXTS:
            raise _refuse(f"{name} must have {MOST_TEXTS} strings at most")
    far = {name: context_size for name in LOOKING_BACK if _is_more(fields.get(name), context_size)}
    return {**fields, **far}


def check_grammar(grammar: str) -> None:
    """Refuse a GBNF grammar whose reading would end this process or never end."""
    if len(grammar) > LONGEST_GRAMMAR:
        raise _refuse(f"the grammar has {len(grammar)} characters; {LONGEST_GRAMMAR} are read at most")
    bare = _OPAQUE.sub("", grammar)
    if any(int(least) > int(most) for least, most in _BOUNDS.findall(bare)):
        raise _refuse("the grammar repeats something at least so often that it is more than at most")
    depth = deepest = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > DEEPEST_GRAMMAR or "\0" in grammar:
        raise _refuse(f"the grammar has more than {DEEPEST_GRAMMAR} brackets within each other, or a zero character")


def _is_more(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and value > most


def _refuse(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
