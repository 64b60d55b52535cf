"""Two pictures side by side as SVG: how long the first token takes under each policy, and a routing decision in fleets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 960, 320
TOP, BOTTOM = 60, 250
INK, FAINT, OURS, OTHERS = "#222", "#ddd", "#c2410c", "#64748b"
QUANTILES = ("p50", "p95", "p99")
AIM = 200.0  # µs of a routing decision

Scale = Callable[[float], float]


def draw(first_tokens: Mapping[str, Sequence[float]], routing: Mapping[int, Sequence[float]], nodes: int) -> str:
    """The picture.

    Args:
        first_tokens: seconds at the quantiles, by policy, ours first; in the fleet of so many nodes.
        routing: µs of our decisions at the quantiles, by nodes.
    """
    parts = [*_first_tokens(first_tokens, nodes), *_routing(routing)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="{INK}">'
    )
    return "\n".join((head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>\n"))


def _first_tokens(found: Mapping[str, Sequence[float]], nodes: int) -> list[str]:
    values = [value for quantiles in found.values() for value in quantiles]
    x = _log(min(values), max(values), 150, 500)
    parts = [_text(20, 28, f"Time to first token, {nodes:,} nodes", weight="bold")]
    parts += _across(x, min(values), max(values), lambda value: f"{value:g} s")
    step = (BOTTOM - TOP) / len(found)
    for row, (policy, quantiles) in enumerate(found.items()):
        y, colour = TOP + step * (row + 0.5), OTHERS if row else OURS
        parts.append(_text(130, y + 4, policy, anchor="end"))
        parts.append(_line(x(quantiles[0]), y, x(quantiles[-1]), y, colour))
        parts += [_dot(x(value), y, colour, radius) for value, radius in zip(quantiles, (6, 5, 4), strict=True)]
        parts += _named(quantiles, x, y) if not row else []
    return parts


def _named(quantiles: Sequence[float], x: Scale, y: float) -> list[str]:
    return [
        _text(x(value), y - 10, name, anchor="middle", size=11)
        for name, value in zip(QUANTILES, quantiles, strict=True)
    ]


def _routing(found: Mapping[int, Sequence[float]]) -> list[str]:
    most = max(AIM, *(max(quantiles) for quantiles in found.values())) * 1.2
    x = _log(min(found), max(found), 620, 900)
    parts = [_text(560, 28, "Time of a routing decision, localai_q", weight="bold")]

    def y(value: float) -> float:
        return BOTTOM - value / most * (BOTTOM - TOP)

    for value in range(0, int(most) + 1, 100):
        parts += [_line(600, y(value), 920, y(value), FAINT), _text(592, y(value) + 4, f"{value} µs", anchor="end")]
    parts += [_line(600, y(AIM), 920, y(AIM), INK, dashed=True), _text(920, y(AIM) - 6, "aim", anchor="end")]
    parts += [_text(x(nodes), BOTTOM + 20, f"{nodes:,} nodes", anchor="middle") for nodes in found]
    for index, colour in ((0, OURS), (2, OTHERS)):
        points = [(x(nodes), y(quantiles[index])) for nodes, quantiles in found.items()]
        parts += [_line(*one, *other, colour) for one, other in pairwise(points)]
        parts += [_dot(*point, colour, 5) for point in points]
        parts.append(_text(points[-1][0] + 10, points[-1][1] + 4, QUANTILES[index], size=11))
    return parts


def _across(x: Scale, least: float, most: float, label: Callable[[float], str]) -> list[str]:
    """Lines at the powers of ten between."""
    powers = range(math.ceil(math.log10(least)), math.floor(math.log10(most)) + 1)
    return [
        part
        for value in (10.0**power for power in powers)
        for part in (
            _line(x(value), TOP, x(value), BOTTOM, FAINT), _text(x(value), BOTTOM + 20, label(value), anchor="middle")
        )
    ]  # fmt: skip


def _log(least: float, most: float, start: float, end: float) -> Scale:
    span = math.log(most / least) or 1.0
    return lambda value: start + math.log(value / least) / span * (end - start)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"{dash}/>'


def _dot(x: float, y: float, colour: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">'
        f"{escape(words)}</text>"
    )
