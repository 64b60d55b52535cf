"""Fleets of many nodes: `python -m bench.simulate [--quick | --plans] [--nodes N] [--plot FILE]`.

The code that decides is the cluster's own; nodes, models and requests are made up.

The time that a plan takes: each fleet is brought up from nothing, then planned again when there is nothing to do, and
when somebody waits for a model that fits only where others make room. Beside each time stands that for one node, and
its ratio to the smallest fleet's: where that grows, something is worse than linear.

What becomes of requests: the same ones under our routing, without its choice of a replica, and under what load balancers
do (`bench.simulation`).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

from bench.simulation import comparison
from localai_q.cluster.fleet import Demand, Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import Place, plan
from localai_q.cluster.states import NodeState, ReplicaState

SIZES = (10, 1000, 10_000)
MODELS = 20
GB = 10**9
NOW = 1_000_000.0


def make_nodes(count: int) -> list[Node]:
    """Nodes of several sizes and zones."""
    chance = random.Random(1)
    return [
        Node(id=f"n{number}", name=f"n{number}", state=NodeState.READY, approved=True, secret_hash="",
             labels={"zone": str(number % 4)}, last_heartbeat=NOW,
             hardware={"ram_available": chance.choice((16, 32, 64)) * GB, "disk_free": 500 * GB, "gpus": []})
        for number in range(count)
    ]  # fmt: skip


def make_models(replicas: int) -> list[Model]:
    """Models of several sizes that want so many replicas each, and one that is to be everywhere."""
    everywhere = Model(id="all", name="all", revision=1, config=ModelConfig(backend="echo", memory=GB, spread_all=True))
    several = [
        Model(id=f"m{number}", name=f"m{number}", revision=1,
              config=ModelConfig(backend="echo", memory=(2 + number % 7) * GB, min_replicas=replicas,
                                 max_replicas=1000, selector={"zone": str(number % 4)}))
        for number in range(MODELS)
    ]  # fmt: skip
    return [everywhere, *several]


def timed(fleet: Fleet) -> tuple[float, list[object]]:
    """Seconds of a plan, and what it decided."""
    started = time.perf_counter()
    actions = plan(fleet)
    return time.perf_counter() - started, list(actions)


def brought_up(fleet: Fleet, actions: list[object]) -> list[Replica]:
    """The replicas of a plan, all ready."""
    models = {model.id: model for model in fleet.models}
    return [
        Replica(id=f"r{number}", model_id=action.model_id, node_id=action.node_id, number=1, revision=1,
                state=ReplicaState.READY, slots=4, changed=NOW - 100, used=NOW - number,
                reserved=Memory(ram=models[action.model_id].config.memory))
        for number, action in enumerate(actions)
        if isinstance(action, Place)
    ]  # fmt: skip


def time_plans() -> None:
    """Print the table of plans."""
    first: dict[str, float] = {}
    print(f"{'nodes':>6} {'situation':22} {'decisions':>9} {'seconds':>8} {'µs/node':>8} {'ratio':>6}")
    for size in SIZES:
        wanted = max(size // 40, 1)
        cold = Fleet(models=make_models(min(wanted, 1000)), nodes=make_nodes(size), replicas=[], now=NOW)
        _, actions = timed(cold)
        loaded = replace(cold, replicas=brought_up(cold, actions))
        new = Model(id="new", name="new", revision=1, config=ModelConfig(backend="echo", memory=60 * GB))
        full = replace(loaded, models=[*loaded.models, new], demand={"new": Demand(waiting=1, longest=3.0)},
                       nodes=[replace(node, hardware={**node.hardware, "budget": 62 * GB}) for node in loaded.nodes])  # fmt: skip
        for situation, fleet in (("from nothing", cold), ("nothing to do", loaded), ("one waits for room", full)):
            seconds, decided = timed(fleet)
            each = seconds / size * 1e6
            first.setdefault(situation, each)
            print(f"{size:6} {situation:22} {len(decided):9} {seconds:8.3f} {each:8.1f} {each / first[situation]:6.2f}")


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small fleets only: less than a minute")
    parser.add_argument("--plans", action="store_true", help="only the times of plans")
    parser.add_argument("--nodes", type=int, help="only requests, and only in the fleet of so many nodes")
    parser.add_argument("--plot", type=Path, help="where the picture of the full comparison goes, as SVG")
    asked = parser.parse_args()
    if not asked.quick and not asked.nodes:
        time_plans()
    fleets = () if asked.plans else comparison.QUICK if asked.quick else comparison.FULL
    found = {fleet: comparison.compare(fleet) for fleet in fleets if asked.nodes in (None, fleet.nodes)}
    if asked.plot:
        comparison.picture(asked.plot, found)


if __name__ == "__main__":
    main()
