"""Which nodes are asked for a file, in which order, and at which address each is reached."""

import pytest

from localai_q.cluster.hardware import Hardware
from localai_q.cluster.holders import MOST_HOLDERS, address_for, holders_of
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import NodeState

FILE = "a" * 64


def node(name: str, address: str | None = None, *, state: NodeState = NodeState.READY, files=(FILE,), **told) -> Node:
    hardware = {"files": list(files), **told, **({"files_address": address} if address else {})}
    return Node(id=name, name=name, state=state, approved=True, secret_hash="", hardware=hardware)


ASKER = node("asker", "10.0.0.1:1", files=())


def order(*known: Node, called: str = "10.0.0.9") -> list[str]:
    return [found.id for found, _ in holders_of(FILE, known, ASKER, called)]


def test_the_own_machine_goes_first_and_then_who_has_least_to_do() -> None:
    busy = node("busy", "10.0.0.2:1", transfers=5)
    idle = node("idle", "10.0.0.3:1", transfers=0)
    near = node("near", "10.0.0.1:2", transfers=9)
    assert order(busy, idle, near) == ["near", "idle", "busy"]


def test_who_cannot_give_it_is_not_named() -> None:
    known = [
        ASKER, node("without", "10.0.0.2:1", files=("b" * 64,)), node("no-address"), node("itself-only", "127.0.0.1:5"),
        node("away", "10.0.0.2:1", state=NodeState.OFFLINE), node("silent", "10.0.0.2:1", state=NodeState.UNHEALTHY),
        node("pending", "10.0.0.2:1", state=NodeState.PENDING),
    ]  # fmt: skip
    assert order(*known) == []
    assert order(node("draining", "10.0.0.2:1", state=NodeState.DRAINING)) == ["draining"]


def test_many_are_some_and_equals_are_not_the_same_for_everybody() -> None:
    known = [node(f"n{number}", f"10.0.1.{number}:1") for number in range(40)]
    assert len(order(*known)) == MOST_HOLDERS
    firsts = {holders_of(FILE, known, node(f"asker{n}"), "h")[0][0].id for n in range(20)}
    assert len(firsts) > 5


@pytest.mark.parametrize(
    ("told", "called", "reached"),
    [
        ("10.0.0.2:5", "10.0.0.9", "10.0.0.2:5"),
        ("[fd00::2]:5", "api.lan", "[fd00::2]:5"),
        ("127.0.0.1:5", "127.0.0.1", "127.0.0.1:5"),
        ("127.0.0.1:5", "localhost", "127.0.0.1:5"),
        ("127.0.0.1:5", "10.0.0.9", ""),
        ("[::1]:5", "10.0.0.9", ""),
        ("0.0.0.0:5", "10.0.0.9", "10.0.0.9:5"),
        ("0.0.0.0:5", "fd00::9", "[fd00::9]:5"),
        ("[::]:5", "api.lan", "api.lan:5"),
        ("", "10.0.0.9", ""),
    ],
)
def test_an_address_is_told_as_the_asker_can_use_it(told: str, called: str, reached: str) -> None:
    assert address_for(told, called) == reached


@pytest.mark.parametrize("address", ["10.0.0.2:5", "a-node.lan:65535", "[fd00::2]:5", None])
def test_an_address_that_is_one_is_believed(address: str | None) -> None:
    assert Hardware(files_address=address).files_address == address


@pytest.mark.parametrize(
    "address", ["", "x", "x:", ":5", "x:0", "x:123456", "a/b:5", "a@b:5", "http://x:5", "[zz]:5", "x:5\n"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="files_address"):
        Hardware(files_address=address)
