"""The registry of the simulated cluster and what control does: real plans on what is known, carried out after the time
that it takes. Machines report, fail and come back.

What a machine really holds is kept apart from what is booked, and may never be more than it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count

from bench.simulation.clock import Clock
from bench.simulation.copies import Copy
from bench.simulation.fleet import Machine, Scenario, make_machines, make_models
from bench.simulation.serving import Serving
from bench.simulation.tally import Tally
from localai_q.cluster.capacity import Site
from localai_q.cluster.fleet import Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import Action, GiveUp, Place, Retry, Stop, plan
from localai_q.cluster.speeds import Measure, Speeds
from localai_q.cluster.states import NodeState, ReplicaState

HEARTBEAT = 10.0  # seconds
SILENT = 30.0  # seconds after which a node counts as unhealthy
AWAY = 60.0  # and as offline
NETWORK = 1e9  # bytes/s that a machine fetches
DISK = 2e9  # bytes/s that it loads
ENDING = 1.0  # seconds that a process takes to end
LONG_AGO = -1000.0


class Control:
    """Nodes, replicas and their copies. Begins with what the first plan wants, loaded and with files in place."""

    def __init__(
        self, clock: Clock, scenario: Scenario, machines: Sequence[Machine], models: Sequence[Model], serving: Serving,
        tally: Tally,
    ) -> None:  # fmt: skip
        self.clock = clock
        self.scenario = scenario
        self.machines = {machine.id: machine for machine in machines}
        self.models = {model.id: model for model in models}
        self.serving = serving
        self.tally = tally
        self.nodes = {machine.id: _node(machine) for machine in machines}
        self.replicas: dict[str, Replica] = {}
        self._number = count()
        self._used = dict.fromkeys(self.machines, 0)  # bytes that processes really hold, by machine like the next two
        self._files: dict[str, set[str]] = {machine.id: set() for machine in machines}
        self._there: dict[str, set[str]] = {machine.id: set() for machine in machines}  # replicas
        self._down: set[str] = set()
        self._measured: list[Measure] = []
        self._known = 0, Speeds()  # what follows from so many of these
        serving.policy.connect(lambda: (list(self.models.values()), list(self.replicas.values())))

    def start(self) -> None:
        """Bring up what is to be there before the first request, and begin to watch."""
        for model_id, node_id in first_places(self.scenario):
            self._files[node_id].add(self._sha(model_id))
            self._loading(self._place(model_id, node_id))
        for replica in list(self.replicas.values()):
            self._loaded(replica.id)
            self.replicas[replica.id] = replace(self.replicas[replica.id], changed=LONG_AGO)
        self.tally.loads = 0
        for number, machine in enumerate(self.machines.values()):
            self._report(machine.id)
            self.clock.after(HEARTBEAT * number / len(self.machines), self._beat, machine.id)
            if machine.outage:
                down, up = machine.outage
                self.clock.after(down, self._fail, machine.id)
                self.clock.after(up, self._return, machine.id)
        self._plan()

    def fleet(self) -> Fleet:
        """What a plan sees."""
        return Fleet(models=list(self.models.values()), nodes=list(self.nodes.values()),
                     replicas=list(self.replicas.values()), demand=self.serving.demand(), busy=dict(self.serving.busy),
                     speeds=self._speeds(), now=self.clock.now)  # fmt: skip

    def _speeds(self) -> Speeds:
        """What is to be expected of nodes; computed again when something new was measured."""
        if self._known[0] != len(self._measured):
            self._known = len(self._measured), Speeds(self._measured, self.models.values())
        return self._known[1]

    def _plan(self) -> None:
        fleet = self.fleet()
        with self.tally.planning.timed():
            actions = plan(fleet)
        self.tally.actions.append(len(actions))
        for action in actions:
            self._act(action)
        self.clock.after(self.scenario.every, self._plan)

    def _act(self, action: Action) -> None:
        match action:
            case Place():
                replica = self._place(action.model_id, action.node_id)
                self.serving.policy.relieve(replica.model_id)
                model = self.models[replica.model_id]
                there = self._sha(model.id) in self._files[replica.node_id]
                self.clock.after(0 if there else model.config.size / NETWORK, self._staged, replica.id)
            case Stop():
                copy = self.serving.copies.get(action.replica_id)
                if copy and not (action.if_idle and not self.serving.is_idle(copy)):
                    self._stop(copy)
            case Retry() | GiveUp():
                raise AssertionError(f"nothing fails to load here, and still: {action}")

    def _place(self, model_id: str, node_id: str) -> Replica:
        model = self.models[model_id]
        number = Site(self.nodes[node_id], self._on(node_id)).number(model_id)
        made = Replica(id=f"r{next(self._number)}", model_id=model_id, node_id=node_id, number=number,
                       revision=model.revision, state=ReplicaState.PLACED, slots=model.config.slots,
                       changed=self.clock.now, reserved=Memory(ram=model.config.memory))  # fmt: skip
        self.replicas[made.id] = made
        self._there[node_id].add(made.id)
        booked = sum(each.reserved.ram for each in self._on(node_id))
        assert booked <= self.machines[node_id].memory, f"{node_id} is over-booked"
        return made

    def _on(self, node_id: str) -> list[Replica]:
        return [self.replicas[each] for each in self._there[node_id]]

    def _staged(self, replica_id: str) -> None:
        replica = self.replicas.get(replica_id)
        if replica and replica.node_id not in self._down:
            self._files[replica.node_id].add(self._sha(replica.model_id))
            self._loading(replica)
            self.clock.after(self.models[replica.model_id].config.size / DISK, self._loaded, replica.id)

    def _loading(self, replica: Replica) -> None:
        self._move(replica.id, ReplicaState.LOADING)
        self._hold(replica.node_id, replica.reserved.ram)

    def _loaded(self, replica_id: str) -> None:
        replica = self.replicas.get(replica_id)
        if replica and replica.node_id not in self._down:
            self._move(replica.id, ReplicaState.READY)
            self.tally.loads += 1
            speed = self.machines[replica.node_id].speed_of(self.models[replica.model_id])
            self.serving.add(Copy(replica.id, replica.model_id, speed, replica.slots))

    def _stop(self, copy: Copy) -> None:
        self._move(copy.id, ReplicaState.STOPPING)
        self.tally.stops += 1
        self.serving.stop(copy)
        self._ending(copy)

    def _ending(self, copy: Copy) -> None:
        if not copy.alive:
            return
        if copy.running or (copy.queue and not self.serving.policy.pulls):
            self.clock.after(ENDING, self._ending, copy)
            return
        self.serving.remove(copy)
        replica = self._drop(copy.id)
        self._hold(replica.node_id, -replica.reserved.ram)

    def _beat(self, node_id: str) -> None:
        if node_id not in self._down:
            self._report(node_id)
        self.clock.after(HEARTBEAT, self._beat, node_id)

    def _report(self, node_id: str) -> None:
        """A machine says what it has and what it has done."""
        now = self.clock.now
        hardware = {**self.nodes[node_id].hardware, "files": sorted(self._files[node_id]),
                    "ram_available": self.machines[node_id].memory - self._used[node_id]}  # fmt: skip
        self.nodes[node_id] = replace(self.nodes[node_id], state=NodeState.READY, hardware=hardware, last_heartbeat=now)
        for replica in self._on(node_id):
            copy = self.serving.copies.get(replica.id)
            if copy and copy.used > replica.used + HEARTBEAT:
                self.replicas[replica.id] = replace(replica, used=copy.used, speed=copy.speed)
                if not replica.speed:
                    self._measured.append(
                        Measure(node_id=node_id, model_id=copy.model_id, tokens_per_second=copy.speed)
                    )

    def _fail(self, node_id: str) -> None:
        """A machine is away, with all that ran on it."""
        self._down.add(node_id)
        self._used[node_id] = 0
        for replica_id in sorted(self._there[node_id]):
            if copy := self.serving.copies.get(replica_id):
                self.serving.crash(copy)
        self.clock.after(SILENT, self._miss, node_id, NodeState.UNHEALTHY)
        self.clock.after(AWAY, self._miss, node_id, NodeState.OFFLINE)

    def _miss(self, node_id: str, state: NodeState) -> None:
        if node_id in self._down:
            self.nodes[node_id] = replace(self.nodes[node_id], state=state)
            if state is NodeState.OFFLINE:
                self._clear(node_id)

    def _return(self, node_id: str) -> None:
        """A machine is back, with its files and nothing loaded."""
        self._down.discard(node_id)
        self._clear(node_id)
        self._report(node_id)

    def _clear(self, node_id: str) -> None:
        for replica_id in list(self._there[node_id]):
            self._drop(replica_id)

    def _drop(self, replica_id: str) -> Replica:
        replica = self.replicas.pop(replica_id)
        self._there[replica.node_id].discard(replica_id)
        return replica

    def _move(self, replica_id: str, state: ReplicaState) -> None:
        self.replicas[replica_id] = replace(self.replicas[replica_id], state=state, changed=self.clock.now)

    def _hold(self, node_id: str, amount: int) -> None:
        self._used[node_id] += amount
        assert 0 <= self._used[node_id] <= self.machines[node_id].memory, f"{node_id} holds {self._used[node_id]} bytes"

    def _sha(self, model_id: str) -> str:
        return self.models[model_id].config.sha256 or ""


@lru_cache(maxsize=1)
def first_places(scenario: Scenario) -> list[tuple[str, str]]:
    """What a plan puts where, model and node, when nothing is there yet: the same under every policy."""
    nodes = [_node(machine) for machine in make_machines(scenario)]
    actions = plan(Fleet(models=make_models(scenario), nodes=nodes, replicas=[], now=0.0))
    return [(action.model_id, action.node_id) for action in actions if isinstance(action, Place)]


def _node(machine: Machine) -> Node:
    hardware = {"ram_available": machine.memory, "budget": machine.memory, "disk_free": 1 << 50, "gpus": []}
    return Node(id=machine.id, name=machine.id, state=NodeState.READY, approved=True, secret_hash="",
                hardware=hardware, last_heartbeat=0.0)  # fmt: skip
