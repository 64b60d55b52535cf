"""One run: a fleet, a trace, and a policy that routes it."""

from __future__ import annotations

from collections.abc import Sequence

from bench.simulation.clock import Clock
from bench.simulation.control import Control
from bench.simulation.fleet import Scenario, make_machines, make_models
from bench.simulation.policies import Policy
from bench.simulation.serving import Serving
from bench.simulation.tally import Tally
from bench.simulation.trace import Request

LONGEST = 3600.0  # seconds after the last request by which the last answer must be there


def simulate(scenario: Scenario, trace: Sequence[Request], policy: Policy) -> Tally:
    """Send the trace's requests to the fleet; what came of it, once all have ended."""
    clock, tally = Clock(), Tally()
    serving = Serving(clock, policy, tally)
    Control(clock, scenario, make_machines(scenario), make_models(scenario), serving, tally).start()
    for request in trace:
        clock.run(request.at)
        serving.arrive(request)
    clock.run(scenario.seconds)
    tally.close(clock.now)
    while tally.unfinished:
        clock.run(clock.now + scenario.every)
        assert clock.now < scenario.seconds + LONGEST, f"{tally.unfinished} requests never ended"
    return tally
