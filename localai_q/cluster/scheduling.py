"""Scheduling rules as LocalAI words them: another view on those fields of a model that say where and how many. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localai_q.cluster.models import Model, ModelConfig
from localai_q.errors import MissingParameter, UnknownParameter

NAME = "model_name"
SAME = ("min_replicas", "max_replicas", "spread_all", "route_policy", "balance_abs_threshold", "balance_rel_threshold",
        "min_prefix_match")  # fmt: skip
FIELDS = {"node_selector": "selector", **{name: name for name in SAME}}  # of a model, by their names in a rule
DEFAULTS = {field: value for field, value in ModelConfig().model_dump().items() if field in FIELDS.values()}


def rule_of(model: Model) -> dict[str, Any]:
    """The rule that the model's fields make."""
    return {NAME: model.name, **{name: getattr(model.config, field) for name, field in FIELDS.items()}}


def fields_of(rule: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model that a rule is for, and the fields that it makes; what it does not say is as for a new model.

    Raises:
        MissingParameter: it names no model.
        UnknownParameter: it says something that no rule does.
    """
    unknown = sorted(map(str, rule.keys() - {NAME, *FIELDS}))  # in YAML a key can be of any kind
    if unknown:
        raise UnknownParameter(f"Unknown parameter: '{unknown[0]}'. A rule has {', '.join([NAME, *FIELDS])}.",
                               param=unknown[0])  # fmt: skip
    name = rule.get(NAME)
    if not isinstance(name, str) or not name:
        raise MissingParameter(f"Missing required parameter: '{NAME}'.", param=NAME)
    return name, {**DEFAULTS, **{FIELDS[key]: value for key, value in rule.items() if key != NAME}}
