"""What an admin says of a node stays, whatever the node says of itself."""

import pytest
from cluster_data import join, node_named

from localai_q.cluster.labels import MOST_LABELS
from localai_q.cluster.nodes import Node
from localai_q.errors import InvalidValue, NotFound
from localai_q.services import fleet, nodes
from localai_q.services.wiring import Services

FOUND = {"node.name": "n1", "node.replica-slots": "1"}


def test_labels_are_replaced_added_and_taken_back(services: Services, node: Node) -> None:
    assert fleet.give_labels(services, "n1", {"a": "1", "b": "2"}, keep=False)["given"] == {"a": "1", "b": "2"}
    assert fleet.give_labels(services, node.id, {"b": "3", "c": "4"}, keep=True)["given"] == {
        "a": "1",
        "b": "3",
        "c": "4",
    }
    assert fleet.take_label(services, "n1", "a")["given"] == {"b": "3", "c": "4"}
    assert fleet.give_labels(services, "n1", {"d": ""}, keep=False)["given"] == {"d": ""}
    assert fleet.labels(services, "n1") == {
        "labels": {**FOUND, "d": ""}, "found": FOUND, "given": {"d": ""}
    }  # fmt: skip


def test_what_an_admin_gives_goes_before_what_was_found_and_survives_a_new_registration(
    services: Services, node: Node
) -> None:
    fleet.give_labels(services, "n1", {"node.os": "plan9", "zone": "attic"}, keep=True)
    nodes.heartbeat(services, node, hardware={"os": "linux", "arch": "arm64"})
    nodes.deregister(services, node)
    join(services)
    found = node_named(services, "n1")
    assert found.labels == {**FOUND, "node.os": "plan9", "node.arch": "arm64", "zone": "attic"}
    (shown,) = fleet.listed(services)
    assert (shown["labels"], shown["given_labels"]) == (found.labels, {"node.os": "plan9", "zone": "attic"})
    assert fleet.take_label(services, "n1", "node.os")["labels"]["node.os"] == "linux"


def test_too_many_labels_are_refused_and_change_nothing(services: Services, node: Node) -> None:
    fleet.give_labels(services, "n1", {f"k{n}": "" for n in range(MOST_LABELS)}, keep=False)
    with pytest.raises(InvalidValue, match=str(MOST_LABELS)):
        fleet.give_labels(services, "n1", {"one": "more"}, keep=True)
    assert len(node_named(services, "n1").given_labels) == MOST_LABELS


def test_what_is_not_there_cannot_be_changed(services: Services, node: Node) -> None:
    for act in (
        lambda: fleet.take_label(services, "n1", "node.name"),
        lambda: fleet.labels(services, "n2"),
        lambda: fleet.give_labels(services, "n2", {}, keep=False),
    ):
        with pytest.raises(NotFound):
            act()
