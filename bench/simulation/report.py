"""The figures of runs as a table."""

from __future__ import annotations

from collections.abc import Sequence

from bench.simulation.fleet import Scenario
from bench.simulation.tally import Tally, quantile

PARTS = (0.5, 0.95, 0.99)
COLUMNS = (
    ("policy", 16), ("in use", 7), ("wait s p50/p95/p99", 22), ("first token s p50/p95/p99", 26), ("cached", 7),
    ("loads", 6), ("lost", 5), ("again", 6), ("routing µs p50/p99", 19), ("plan ms p50/p99", 16),
)  # fmt: skip


def header() -> str:
    """The names of the columns."""
    return " ".join(f"{name:>{width}}" for name, width in COLUMNS)


def line(policy: str, tally: Tally) -> str:
    """One run."""
    cells = (
        policy,
        f"{tally.utilisation:.0%}",
        _parts(tally.waits),
        _parts(tally.first_tokens),
        f"{tally.cached_tokens / max(tally.prompt_tokens, 1):.0%}",
        str(tally.loads),
        str(tally.lost),
        str(tally.continued),
        _real(tally.routing.seconds, 1e6),
        _real(tally.planning.seconds, 1e3),
    )
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def title(scenario: Scenario, requests: int, copies: int, seconds: float) -> str:
    """What is simulated, and how long the plan took that places its first copies."""
    return (
        f"{scenario.nodes} nodes, {scenario.models} models, {requests} requests in {scenario.seconds:.0f} s, a plan every "
        f"{scenario.every:g} s; the first placed {copies} copies in {seconds:.2f} s, {1e6 * seconds / copies:.0f} µs each"
    )


def parts(values: Sequence[float]) -> list[float]:
    """The quantiles of `PARTS`."""
    return [quantile(values, part) for part in PARTS]


def _parts(seconds: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in parts(seconds))


def _real(seconds: Sequence[float], unit: float) -> str:
    return " / ".join(f"{quantile(seconds, part) * unit:.1f}" for part in (0.5, 0.99))
