"""Made-up machines and models, the same for the same numbers.

Machines differ in memory and speed, and some fail for a while. Models differ in size, by which a machine is slower with
them, and in how often they are asked for; the popular ones have as many copies as their share of the requests needs, the rare ones none until somebody asks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from localai_q.cluster.models import Model, ModelConfig

GB = 10**9
MEMORIES = (24, 48, 80)  # GB of a machine
SPEEDS = (10.0, 60.0)  # tokens/s that one slot writes of a model of usual size, least and most
USUAL = 8 * GB
PROMPT_FACTOR = 20.0  # how many tokens of a prompt are read in the time in which one is written
SIZES = (4, 5, 6, 8, 10, 16)  # GB of a model
MOST_COPIES = 1000  # of one model, as its configuration allows
RARE = 0.2  # of the models, the part of which nothing is kept loaded
RARELY = 0.5  # of one copy, the part that the requests for a rare model need
UNUSED = 60.0  # seconds after which a copy too many goes
OUTAGE = (20.0, 200.0)  # seconds that a machine is away, least and most


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated."""

    nodes: int
    models: int
    seconds: float  # in which requests come
    load: float = 0.6  # of all slots of the copies that are needed, the part that the requests keep at work
    copies: int = 5  # loaded, for each node
    slots: int = 2  # of each copy
    failing: float = 0.02  # of the machines, the part that fails once
    every: float = 1.0  # seconds between two plans
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One made-up node."""

    id: str
    memory: int  # bytes
    speed: float  # tokens/s that one slot writes of a model of usual size
    outage: tuple[float, float] | None  # from when until when it is away

    def speed_of(self, model: Model) -> float:
        """Tokens/s that one slot writes of the model: each token takes all its weights through the memory."""
        return self.speed * USUAL / model.config.size


def make_machines(scenario: Scenario) -> list[Machine]:
    """The machines of the fleet."""
    chance = random.Random(f"machines {scenario.seed}")
    failing = set(chance.sample(range(scenario.nodes), math.ceil(scenario.failing * scenario.nodes)))
    return [
        Machine(id=f"n{number:05}", memory=chance.choice(MEMORIES) * GB, speed=chance.uniform(*SPEEDS),
                outage=_outage(chance, scenario.seconds) if number in failing else None)
        for number in range(scenario.nodes)
    ]  # fmt: skip


def make_models(scenario: Scenario) -> list[Model]:
    """The models, the most popular first."""
    chance = random.Random(f"models {scenario.seed}")
    common, copies = _common(scenario), scenario.nodes * scenario.copies
    return [
        _model(rank, chance.choice(SIZES), share * copies, scenario.slots, kept=rank < common)
        for rank, share in enumerate(shares(scenario))
    ]


def shares(scenario: Scenario) -> list[float]:
    """Which part of the work each model is: as Zipf says, but none more than the copies that it may have carry."""
    copies, common = scenario.nodes * scenario.copies, _common(scenario)
    rare = [RARELY / copies] * (scenario.models - common)
    left, most = 1 - sum(rare), MOST_COPIES / copies
    weights = [1 / rank for rank in range(1, common + 1)]
    capped = 0
    while (left - capped * most) * weights[capped] / sum(weights[capped:]) > most:
        capped += 1
    each = (left - capped * most) / sum(weights[capped:])
    return [most] * capped + [each * weight for weight in weights[capped:]] + rare


def _common(scenario: Scenario) -> int:
    """How many models are always loaded."""
    return math.ceil(scenario.models * (1 - RARE))


def asked(scenario: Scenario) -> list[float]:
    """Which part of the requests is for each model: those to a large one are more work."""
    times = [share / model.config.size for share, model in zip(shares(scenario), make_models(scenario), strict=True)]
    return [each / sum(times) for each in times]


def token_seconds(scenario: Scenario) -> float:
    """Mean time that a slot takes for a token."""
    machines = make_machines(scenario)
    usual = sum(1 / machine.speed for machine in machines) / len(machines)
    sizes = [model.config.size / USUAL for model in make_models(scenario)]
    return usual * sum(size * part for size, part in zip(sizes, asked(scenario), strict=True))


def _outage(chance: random.Random, seconds: float) -> tuple[float, float]:
    start = chance.uniform(0.1, 0.7) * seconds
    return start, start + chance.uniform(*OUTAGE)


def _model(rank: int, size: int, needed: float, slots: int, *, kept: bool) -> Model:
    config = ModelConfig(
        source=f"store:{rank:064x}",
        sha256=f"{rank:064x}",
        size=size * GB,
        memory=size * GB,
        slots=slots,
        min_replicas=min(math.ceil(needed), MOST_COPIES) if kept else 0,
        max_replicas=min(math.ceil(2 * needed) + 1, MOST_COPIES),
        idle_timeout=UNUSED,
    )
    return Model(id=f"m{rank:03}", name=f"m{rank:03}", revision=1, config=config)
