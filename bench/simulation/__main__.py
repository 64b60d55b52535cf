"""Our policy beside others on the same requests: `python -m bench.simulation [--quick]`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

from bench.simulation import report
from bench.simulation.fleet import Scenario, make_models
from bench.simulation.policies import LeastInFlight, Policy, Pull, Random, RoundRobin
from bench.simulation.run import simulate
from bench.simulation.tally import Tally
from bench.simulation.trace import make_trace

POLICIES: tuple[type[Policy], ...] = (Pull, LeastInFlight, RoundRobin, Random)
QUICK = (Scenario(nodes=10, models=10, seconds=300.0), Scenario(nodes=100, models=20, seconds=60.0))
FULL = (
    Scenario(nodes=10, models=10, seconds=1200.0),
    Scenario(nodes=1000, models=60, seconds=300.0),
    Scenario(nodes=10_000, models=300, seconds=60.0, every=5.0),
)


def compare(scenario: Scenario, policies: Sequence[type[Policy]]) -> dict[str, Tally]:
    """Run each policy on the same trace, and print what came of it."""
    trace = make_trace(scenario)
    gc.freeze()  # so that the times of decisions do not hold those of going through the trace
    copies = sum(model.config.min_replicas for model in make_models(scenario))
    print(report.title(scenario, len(trace), copies), report.header(), sep="\n", flush=True)
    found = {}
    for policy in policies:
        found[policy.name] = simulate(scenario, trace, policy())
        print(report.line(policy.name, found[policy.name]), flush=True)
    return found


def main() -> None:
    """Simulate the fleets that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller fleets, less than a minute")
    parser.add_argument("--nodes", type=int, help="only the fleet of so many nodes")
    asked = parser.parse_args()
    for scenario in QUICK if asked.quick else FULL:
        if asked.nodes in (None, scenario.nodes):
            compare(scenario, POLICIES)


if __name__ == "__main__":
    main()
