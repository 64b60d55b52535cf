"""Scheduling rules are a view on models' fields; those that are declared hold again at each start, or end it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from cluster_data import add_model, model_named, ready_node

from localai_q.cluster.capacity import Booking
from localai_q.cluster.models import AROUND_REPLICAS, ModelConfig
from localai_q.cluster.scheduling import FIELDS
from localai_q.cluster.states import ReplicaState
from localai_q.config import Settings
from localai_q.errors import (
    Conflict,
    InvalidValue,
    LocalAIError,
    MissingParameter,
    ModelNotFound,
    StartupError,
    UnknownParameter,
)
from localai_q.services import models, scheduling
from localai_q.services.wiring import Services
from localai_q.store import replicas

RULE = {"model_name": "m", "node_selector": {"gpu": "a100"}, "min_replicas": 1, "max_replicas": 3, "spread_all": False,
        "route_policy": "round_robin", "balance_abs_threshold": 4, "balance_rel_threshold": 2.5,
        "min_prefix_match": 0.5}  # fmt: skip


def declaring(services: Services, **settings: object) -> Services:
    return Services(services.settings.model_copy(update=settings), services.db, services.redis, services.leases,
                    services.doorbells)  # fmt: skip


def test_a_rule_is_the_models_fields(services: Services) -> None:
    add_model(services, idle_timeout=9.0)
    assert scheduling.put(services, RULE) == RULE
    config = model_named(services, "m").config
    assert (config.selector, config.max_replicas, config.idle_timeout) == ({"gpu": "a100"}, 3, 9.0)
    models.edit(services, "m", {"max_replicas": 5})
    assert scheduling.show(services, "m") == {**RULE, "max_replicas": 5}
    assert scheduling.listed(services) == [{**RULE, "max_replicas": 5}]


def test_a_rule_is_whole_and_what_is_taken_back_is_as_for_a_new_model(services: Services) -> None:
    add_model(services, pinned=True)
    scheduling.put(services, RULE)
    scheduling.put(services, {"model_name": "m", "min_replicas": 1})
    assert model_named(services, "m").config == ModelConfig(backend="echo", pinned=True, min_replicas=1)
    scheduling.reset(services, "m")
    assert model_named(services, "m").config == ModelConfig(backend="echo", pinned=True)
    assert model_named(services, "m").revision == 1, "nothing was loaded anew"
    assert set(FIELDS.values()) <= AROUND_REPLICAS


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        ({"model_name": "m", "colour": "red"}, UnknownParameter, "colour"),
        ({"model_name": "m", "pinned": True}, UnknownParameter, "pinned"),
        ({"min_replicas": 1}, MissingParameter, "model_name"),
        ({"model_name": 5}, MissingParameter, "model_name"),
        ({"model_name": "m", "max_replicas": 0}, InvalidValue, "max_replicas"),
        ({"model_name": "m", "min_replicas": 2}, InvalidValue, "above max_replicas"),
        ({"model_name": "nobody"}, ModelNotFound, "nobody"),
    ],
)
def test_what_is_no_rule_is_refused_and_changes_nothing(
    services: Services, rule: dict, error: type[LocalAIError], words: str
) -> None:
    add_model(services)
    with pytest.raises(error, match=words):
        scheduling.put(services, rule)
    assert model_named(services, "m").config == ModelConfig(backend="echo")


class TestOfALoadedModel:
    RULE: ClassVar = {"model_name": "m", "node_selector": {"gpu": "none"}}

    @pytest.fixture(autouse=True)
    def loaded(self, services: Services) -> None:
        node, model_id = ready_node(services), add_model(services)
        with services.db.transaction() as db:
            replicas.enter(db, "r", ReplicaState.READY, booking=Booking(), model_id=model_id, node_id=node.id, number=1,
                           revision=1, slots=4)  # fmt: skip

    def test_what_no_node_could_have_is_refused(self, services: Services) -> None:
        with pytest.raises(Conflict, match="lacks the label gpu=none"):
            scheduling.put(services, self.RULE)
        assert scheduling.put(services, self.RULE, force=True)["node_selector"] == {"gpu": "none"}

    def test_what_is_declared_holds_though_the_nodes_for_it_are_yet_to_come(self, services: Services) -> None:
        scheduling.apply_declared(declaring(services, model_scheduling=json.dumps([self.RULE])))
        assert model_named(services, "m").config.selector == {"gpu": "none"}


class TestDeclared:
    def test_what_is_declared_holds_again_at_each_start(self, services: Services) -> None:
        add_model(services)
        add_model(services, "other", min_replicas=1)
        own = declaring(services, model_scheduling='[{"model_name": "m", "max_replicas": 4}]')
        for _ in range(2):
            scheduling.apply_declared(own)
            assert model_named(services, "m").config.max_replicas == 4
            models.edit(services, "m", {"max_replicas": 2})
        assert model_named(services, "other").config.min_replicas == 1

    def test_a_file_says_the_same(self, services: Services, tmp_path: Path) -> None:
        add_model(services)
        path = tmp_path / "rules.yaml"
        path.write_text("- model_name: m\n  node_selector: {gpu: a100}\n  spread_all: true\n")
        scheduling.apply_declared(declaring(services, model_scheduling_config=path))
        assert model_named(services, "m").config == ModelConfig(
            backend="echo", selector={"gpu": "a100"}, spread_all=True
        )

    def test_a_rule_for_a_model_that_is_not_there_is_logged(
        self, services: Services, caplog: pytest.LogCaptureFixture
    ) -> None:
        add_model(services)
        rules = '[{"model_name": "absent"}, {"model_name": "m", "min_replicas": 1}]'
        scheduling.apply_declared(declaring(services, model_scheduling=rules))
        assert "absent" in caplog.text
        assert model_named(services, "m").config.min_replicas == 1

    def test_a_rule_that_its_model_cannot_have_ends_the_start(self, services: Services) -> None:
        add_model(services, idle_timeout=9.0)
        own = declaring(services, model_scheduling='[{"model_name": "m", "spread_all": true}]')
        with pytest.raises(StartupError, match=r"rule for model 'm': .*idle_timeout"):
            scheduling.apply_declared(own)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "LOCALAI_MODEL_SCHEDULING is no JSON"),
            ("{}", "needs a list of rules"),
            ("[5]", "needs a list of rules"),
            ('[{"model_name": "a"}, {"model_name": "b", "colour": 1}]', "rule 2: Unknown parameter: 'colour'"),
            ('[{"model_name": "a", "min_replicas": -1}]', "rule 1: Invalid value for 'min_replicas'"),
            ('[{"model_name": "a"}, {"model_name": "a"}]', "rule 2: there is a rule for 'a' already"),
        ],
    )
    def test_what_is_wrong_is_named(self, settings: Settings, text: str, words: str) -> None:
        with pytest.raises(StartupError, match=words):
            scheduling.declared(settings.model_copy(update={"model_scheduling": text}))

    def test_a_file_that_cannot_be_read_is_named(self, settings: Settings, tmp_path: Path) -> None:
        path = tmp_path / "rules.yaml"
        with pytest.raises(StartupError, match=f"cannot read {path}"):
            scheduling.declared(settings.model_copy(update={"model_scheduling_config": path}))
        path.write_text("- [")
        with pytest.raises(StartupError, match=f"cannot read {path}"):
            scheduling.declared(settings.model_copy(update={"model_scheduling_config": path}))
        path.write_text("- {model_name: m, 5: x, colour: red}")
        with pytest.raises(StartupError, match="rule 1: Unknown parameter: '5'"):
            scheduling.declared(settings.model_copy(update={"model_scheduling_config": path}))
        both = {"model_scheduling_config": path, "model_scheduling": "[]"}
        with pytest.raises(StartupError, match="keep one of them"):
            scheduling.declared(settings.model_copy(update=both))

    @pytest.mark.parametrize("command", [["localai-q", "up"], ["celery", "-A", "localai_q", "worker", "-Q", "control"]])
    def test_a_wrong_one_ends_each_process_with_one_line(
        self, settings: Settings, tmp_path: Path, command: list[str]
    ) -> None:
        wrong = {"LOCALAI_MODEL_SCHEDULING": "[5]", "LOCALAI_Q_HOME": str(tmp_path / "own"),
                 "LOCALAI_DATABASE_URL": settings.database_url, "LOCALAI_REDIS_URL": settings.redis_url}  # fmt: skip
        done = subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:]],
            env={**os.environ, **wrong}, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1
        assert [
            line for line in done.stderr.splitlines() if "needs a list of rules" in line
        ] == done.stderr.splitlines()
