"""What was asked under kills and what came of it: the plan that two systems share, and the counts that compare them.

Owns when jobs arrive and kills strike, whether a text is what it should be, and the table. Knows neither system.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ON_ITS_WAY = 0.15  # seconds after a kill in which what its victim had said before still arrives
TALKING = 1.0  # seconds since its last token for which a stream counts as under way, and can be hit
COMES_BACK = 15.0  # seconds that a kill waits for its victim to be there at all
KINDS = ("stream", "stream", "whole", "background")  # how a job is asked for; half of all stream


@dataclass(frozen=True)
class Plan:
    """The same for both systems: made of the seed alone. Times are seconds since the start."""

    jobs: int
    tokens: int
    delay: float  # seconds between two tokens of a job
    arrivals: list[float]
    kinds: list[str]
    kills: list[tuple[float, str, int]]  # when, what, and a number that chooses among several
    patience: float  # seconds after the last kill and the last arrival at which what has not ended counts as lost


def make_plan(
    *, jobs: int, kills: int, rate: float, tokens: int, delay: float, victims: list[str], seed: int, patience: float
) -> Plan:
    """Jobs arrive evenly, `rate` a second; each kill strikes somewhere in its share of that time."""
    dice = random.Random(seed)
    span = jobs / rate
    deck: list[str] = []
    while len(deck) < kills:
        deck += dice.sample(victims, len(victims))
    moments = [span * (number + dice.uniform(0.1, 0.9)) / kills for number in range(kills)]
    return Plan(
        jobs=jobs,
        tokens=tokens,
        delay=delay,
        arrivals=[number / rate for number in range(jobs)],
        kinds=[dice.choice(KINDS) for _ in range(jobs)],
        kills=[(moment, what, dice.randrange(1 << 16)) for moment, what in zip(moments, deck, strict=False)],
        patience=patience,
    )


@dataclass
class Strike:
    """One kill, and the streams that it hit."""

    what: str
    at: float  # monotonic
    hit: list[Any] = field(default_factory=list)


@dataclass
class Tally:
    """What came of a plan."""

    accepted: int = 0
    done: int = 0
    cancelled: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    lost: int = 0
    twice: int = 0  # texts that have a token twice or out of order
    holed: int = 0  # texts that lack a token in their middle, or at the end of an answer that was done
    continued: int = 0  # done, and not by the first that took it
    refused: int = 0  # submissions that were refused, and sent again
    unheard: int = 0  # submissions that broke off before anything was heard of them, and were sent again
    unheard_states: Counter[str] = field(default_factory=Counter)  # of the jobs among them that were accepted after all
    resumed: int = 0  # times that a client came back to a stream or for a result
    gaps: dict[str, list[float]] = field(default_factory=dict)  # seconds from kill to next token, by victim
    silent: Counter[str] = field(default_factory=Counter)  # streams that were hit and never said anything again
    struck: Counter[str] = field(default_factory=Counter)  # kills, by victim
    seconds: float = 0.0

    def judge(self, words: list[int], tokens: int, *, done: bool) -> None:
        """Count what is wrong with a text of numbers."""
        if any(later <= sooner for sooner, later in itertools.pairwise(words)):
            self.twice += 1
        elif words != list(range(len(words))) or (done and len(words) != tokens):
            self.holed += 1

    def note_gap(self, strike: Strike, said: list[float]) -> None:
        """A stream that was hit by this kill said something at these (monotonic) times."""
        later = next((moment for moment in said if moment > strike.at + ON_ITS_WAY), None)
        if later is None:
            self.silent[strike.what] += 1
        else:
            self.gaps.setdefault(strike.what, []).append(later - strike.at)

    def to_json(self) -> dict[str, Any]:
        every = [gap for gaps in self.gaps.values() for gap in gaps]
        by_victim = {what: summary(self.gaps.get(what, [])) for what in self.struck}
        return {**vars(self), "gap_s": summary(every), "gap_s_by_victim": by_victim}


def summary(seconds: list[float]) -> dict[str, float]:
    """Number, median, 90th percentile and largest."""
    if not seconds:
        return {"n": 0}
    ordered = sorted(seconds)
    p90 = ordered[min(int(len(ordered) * 0.9), len(ordered) - 1)]
    return {"n": len(ordered), "median": statistics.median(ordered), "p90": p90, "max": ordered[-1]}


def table(columns: dict[str, Tally]) -> str:
    """The tallies side by side."""
    rows: list[tuple[str, list[str]]] = []

    def row(title: str, values: list[Any]) -> None:
        rows.append((title, [str(value) for value in values]))

    tallies = list(columns.values())
    row("accepted", [each.accepted for each in tallies])
    row("done", [each.done for each in tallies])
    row("failed, with a reason", [each.failed.total() for each in tallies])
    for reason in sorted({reason for each in tallies for reason in each.failed}):
        row(f"    {reason[:100]}", [each.failed[reason] for each in tallies])
    row("cancelled", [each.cancelled for each in tallies])
    row("LOST: accepted, and neither of these", [each.lost for each in tallies])
    row("DOUBLED: a token twice or out of order", [each.twice for each in tallies])
    row("HOLED: a token missing", [each.holed for each in tallies])
    row("continued by another owner, and done", [each.continued for each in tallies])
    row("submissions refused, sent again", [each.refused for each in tallies])
    row("submissions without an answer, sent again", [each.unheard for each in tallies])
    for state in sorted({state for each in tallies for state in each.unheard_states}):
        row(f"    jobs of which no client had heard: {state[:100]}", [each.unheard_states[state] for each in tallies])
    row("times that a client came back", [each.resumed for each in tallies])
    row(
        "kill to next token, s: median / p90 / max (went on / hit)",
        [_spread(each, list(each.struck)) for each in tallies],
    )
    for what in dict.fromkeys(what for each in tallies for what in each.struck):
        row(f"    {what}", [_spread(each, [what]) if each.struck[what] else "" for each in tallies])
    row("wall time, s", [f"{each.seconds:.0f}" for each in tallies])
    wide = [max(len(name), *(len(values[at]) for _, values in rows)) for at, name in enumerate(columns)]
    first = max(len(title) for title, _ in rows)
    lines = [("", list(columns)), *rows]
    return "\n".join(
        f"{title:<{first}}  " + "  ".join(f"{value:>{width}}" for value, width in zip(values, wide, strict=True))
        for title, values in lines
    )


def _spread(tally: Tally, victims: list[str]) -> str:
    """The gaps after kills of these victims, in one cell."""
    found = summary([gap for what in victims for gap in tally.gaps.get(what, [])])
    silent = sum(tally.silent[what] for what in victims)
    kills = sum(tally.struck[what] for what in victims)
    said = f"{found['median']:.2f} / {found['p90']:.2f} / {found['max']:.2f}" if found["n"] else "-"
    return f"{said} ({found['n']:.0f} / {found['n'] + silent:.0f}), {kills} kills"
