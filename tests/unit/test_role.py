"""The role of a worker follows from its queues."""

import importlib

import pytest

from localai_q import names
from localai_q.celery import ROLES, role_of


@pytest.mark.parametrize(
    ("queues", "role"),
    [
        (None, "node"),
        ("", "node"),
        ([], "node"),
        ("control", "control"),
        (["control"], "control"),
        (names.node_jobs_queue("n1"), "jobs"),
        ([names.node_jobs_queue("n1")], "jobs"),
        (f"{names.model_queue('m1')},{names.replica_queue('r1')}", "replica"),
        ([names.model_queue("m1"), names.replica_queue("r1")], "replica"),
    ],
)
def test_the_role_follows_from_the_queues(queues, role) -> None:
    assert role_of(queues) == role


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_a_module_that_can_prepare_a_worker(role) -> None:
    module = importlib.import_module(ROLES[role])
    assert callable(module.prepare)
