"""The time that a plan takes for fleets of many nodes, with up to 50,000 replicas.

Each fleet is brought up from nothing, then planned again when there is nothing to do, when some nodes are lost, and when
somebody waits for a model that fits only where others make room. Times are those of the processor. Beside each stands
what one decision takes above a plan that decides nothing, and its ratio to that in the smallest fleet where there was
one.
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import replace

from localai_q.cluster.fleet import Demand, Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import Action, Note, Place, plan
from localai_q.cluster.states import NodeState, ReplicaState

SIZES = (10, 1000, 10_000)
MODELS = 40  # beside one that is everywhere; each has a replica for every tenth node
GB = 10**9
NOW = 1_000_000.0
TURNS = 3  # of which the fastest counts


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
              config=ModelConfig(backend="echo", memory=(1 + number % 4) * GB, min_replicas=replicas,
                                 max_replicas=1000, selector={"zone": str(number % 4)}))
        for number in range(MODELS)
    ]  # fmt: skip
    return [everywhere, *several]


def timed(fleet: Fleet) -> tuple[float, list[Action]]:
    """Seconds of the processor for a plan, and what it decided."""
    times = []
    for _ in range(TURNS):
        gc.collect()
        started = time.process_time()
        actions = plan(fleet)
        times.append(time.process_time() - started)
    return min(times), [action for action in actions if not isinstance(action, Note)]


def brought_up(fleet: Fleet, actions: list[Action]) -> list[Replica]:
    """The replicas of a plan, all ready, and reported."""
    models = {model.id: model for model in fleet.models}
    return [
        Replica(id=f"r{number}", model_id=action.model_id, node_id=action.node_id, number=1, revision=1,
                state=ReplicaState.READY, slots=4, changed=NOW - 100, used=NOW - number,
                reserved=Memory(ram=models[action.model_id].config.memory))
        for number, action in enumerate(actions)
        if isinstance(action, Place)
    ]  # fmt: skip


def reported(fleet: Fleet) -> list[Node]:
    """The nodes with what their replicas leave free, and no budget beyond it."""
    used = dict.fromkeys((node.id for node in fleet.nodes), 0)
    for replica in fleet.replicas:
        used[replica.node_id] += replica.reserved.ram
    return [
        replace(node, hardware={**node.hardware, "ram_available": node.hardware["ram_available"] - used[node.id]})
        for node in fleet.nodes
    ]


def situations(size: int) -> dict[str, Fleet]:
    """A fleet of so many nodes, in several situations."""
    cold = Fleet(models=make_models(max(size // 10, 1)), nodes=make_nodes(size), replicas=[], now=NOW)
    loaded = replace(cold, replicas=brought_up(cold, plan(cold)))
    loaded = replace(loaded, nodes=reported(loaded))
    lost = {node.id for node in loaded.nodes[:: max(size // 10, 2)]}
    less = replace(loaded, nodes=[node for node in loaded.nodes if node.id not in lost],
                   replicas=[replica for replica in loaded.replicas if replica.node_id not in lost])  # fmt: skip
    new = Model(id="new", name="new", revision=1, config=ModelConfig(backend="echo", memory=60 * GB))
    full = replace(loaded, models=[*loaded.models, new], demand={"new": Demand(waiting=1, longest=3.0)})
    return {"nothing to do": loaded, "from nothing": cold, "nodes are lost": less, "one waits for room": full}


def time_plans() -> None:
    """Print the table."""
    first: dict[str, float] = {}
    print(
        f"{'nodes':>6} {'replicas':>8} {'situation':20} {'decisions':>9} {'seconds':>8} {'µs/decision':>11} {'ratio':>6}"
    )
    for size in SIZES:
        idle = 0.0
        for situation, fleet in situations(size).items():
            seconds, decided = timed(fleet)
            idle = idle or seconds
            each = max(seconds - idle, 0.0) / len(decided) * 1e6 if decided else 0.0
            if decided:
                first.setdefault(situation, each)
            beside = f"{each:11.1f} {each / first[situation]:6.2f}" if decided else ""
            print(f"{size:6} {len(fleet.replicas):8} {situation:20} {len(decided):9} {seconds:8.4f} {beside}")
