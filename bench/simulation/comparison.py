"""Our policy beside others on the same requests, in fleets of several sizes."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.simulation import plot, report
from bench.simulation.control import first_places
from bench.simulation.fleet import Scenario
from bench.simulation.ours import Ours
from bench.simulation.policies import LeastInFlight, Policy, Random, RoundRobin
from bench.simulation.run import simulate
from bench.simulation.tally import Tally
from bench.simulation.trace import make_trace

POLICIES: tuple[type[Policy], ...] = (Ours, Policy, LeastInFlight, RoundRobin, Random)
QUICK = (Scenario(nodes=10, models=10, seconds=300.0), Scenario(nodes=100, models=20, seconds=60.0))
FULL = (
    Scenario(nodes=10, models=10, seconds=600.0),
    Scenario(nodes=1000, models=60, seconds=60.0),
    Scenario(nodes=10_000, models=300, seconds=10.0, every=5.0),
)
SHOWN = 1  # the fleet whose requests the picture shows


def compare(scenario: Scenario, policies: Sequence[type[Policy]] = POLICIES) -> dict[str, Tally]:
    """Run each policy on the same trace, and print what came of it."""
    trace = make_trace(scenario)
    started = time.perf_counter()
    copies = len(first_places(scenario))
    seconds = time.perf_counter() - started
    print(report.title(scenario, len(trace), copies, seconds), report.header(), sep="\n", flush=True)
    gc.freeze()  # so that the times of decisions do not hold those of going through the trace
    found = {}
    for policy in policies:
        found[policy.name] = simulate(scenario, trace, policy())
        print(report.line(policy.name, found[policy.name]), flush=True)
    gc.unfreeze()
    return found


def picture(path: Path, found: Mapping[Scenario, Mapping[str, Tally]]) -> None:
    """Write the picture of these comparisons."""
    scenario, tallies = list(found.items())[SHOWN]
    first_tokens = {name: report.parts(tally.first_tokens) for name, tally in tallies.items()}
    routing = {
        each.nodes: [1e6 * value for value in report.parts(runs[Ours.name].routing.seconds)]
        for each, runs in found.items()
    }
    path.write_text(plot.draw(first_tokens, routing, scenario.nodes))
