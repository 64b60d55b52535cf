"""Places are found without a look at every node, and are those that a look at every node would find."""

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import fleets

from localai_q.cluster.fleet import Board, Fleet
from localai_q.cluster.models import Model
from localai_q.cluster.placement import _score, best

SHA = "a" * 64


@st.composite
def fleets_with_files(draw) -> Fleet:
    """Fleets in which some nodes have the file of some models, and replicas have more or less to do."""
    fleet = draw(fleets())
    for node in fleet.nodes:
        node.hardware["files"] = draw(st.sampled_from([[], [SHA], ["b" * 64]]))
    for replica in fleet.replicas:
        fleet.busy[replica.id] = draw(st.integers(0, 2))
    models = [
        model.model_copy(
            update={"config": model.config.model_copy(update={"sha256": draw(st.sampled_from([SHA, None]))})}
        )
        for model in fleet.models
    ]
    return Fleet(models=models, nodes=fleet.nodes, replicas=fleet.replicas, demand=fleet.demand, busy=fleet.busy,
                 now=fleet.now)  # fmt: skip


def plainly(board: Board, model: Model, most: int) -> list[str]:
    """The places, by a look at every node for each of them."""
    found: list[str] = []
    while len(found) < most:
        fitting = [verdict for node_id in board.nodes if (verdict := board.examine(model, node_id)).fits]
        if not fitting:
            break
        chosen = min(fitting, key=lambda verdict: _score(board, model, verdict))
        board.book(model, chosen)
        found.append(chosen.node.id)
    return found


@settings(max_examples=400, deadline=None)
@given(fleets_with_files(), st.integers(1, 6))
def test_the_best_places_are_those_of_a_look_at_every_node(fleet: Fleet, most: int) -> None:
    fast, plain = Board(fleet), Board(fleet)
    for model in fleet.models:
        assert [verdict.node.id for verdict in islice(best(fast, model), most)] == plainly(plain, model, most)
