"""Scheduling rules: shown, set, taken back, and declared by the settings, which hold again at each start of control."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import yaml

from localai_q.cluster.models import ModelConfig
from localai_q.cluster.scheduling import DEFAULTS, fields_of, rule_of
from localai_q.config import Settings
from localai_q.documents import checked
from localai_q.errors import LocalAIError, ModelNotFound, StartupError
from localai_q.services import models as model_services
from localai_q.services.wiring import Services
from localai_q.store import models

log = logging.getLogger(__name__)

INLINE, FILE = "LOCALAI_MODEL_SCHEDULING", "LOCALAI_MODEL_SCHEDULING_CONFIG"


def listed(services: Services) -> list[dict[str, Any]]:
    """The rule of every model."""
    with services.db.transaction() as db:
        return [rule_of(model) for model in models.every(db)]


def show(services: Services, name: str) -> dict[str, Any]:
    """The rule of one model.

    Raises:
        ModelNotFound: there is none of that name.
    """
    return rule_of(model_services.named(services, name))


def put(services: Services, rule: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
    """Let a model's rule be this one, and return it. `force`: even if the model is loaded and no node could have it so.

    Raises:
        ModelNotFound: there is no such model.
        Conflict: the model would be gone for good.
        MissingParameter, UnknownParameter, InvalidValue: it is no rule, or none that the model can have.
    """
    name, fields = fields_of(rule)
    model_services.edit(services, name, fields, force=force)
    return show(services, name)


def reset(services: Services, name: str) -> None:
    """Let a model's rule be that of a new model.

    Raises:
        ModelNotFound: there is none of that name.
    """
    model_services.edit(services, name, DEFAULTS)


def declared(settings: Settings) -> list[dict[str, Any]]:
    """The rules that the settings declare.

    Raises:
        StartupError: they cannot be read, or one of them is no rule.
    """
    if settings.model_scheduling and settings.model_scheduling_config:
        raise StartupError(f"{INLINE} and {FILE} are both set: keep one of them")
    source, rules = (FILE, _from_file(settings)) if settings.model_scheduling_config else (INLINE, _inline(settings))
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise StartupError(f"{source} needs a list of rules, each with 'model_name'")
    seen: set[str] = set()
    for number, rule in enumerate(rules, 1):
        try:
            name, fields = fields_of(rule)
            checked(ModelConfig, fields)
        except LocalAIError as error:
            raise StartupError(f"{source}, rule {number}: {error.message}") from error
        if name in seen:
            raise StartupError(f"{source}, rule {number}: there is a rule for '{name}' already")
        seen.add(name)
    return rules


def apply_declared(services: Services) -> None:
    """Let the models have the rules that the settings declare, whatever was set since the last start.

    Raises:
        StartupError: they cannot be read, or a model cannot have its rule.
    """
    for rule in declared(services.settings):
        try:
            put(services, rule, force=True)  # the nodes that it is for may be yet to come
        except ModelNotFound:
            log.warning("the rule for model %s has no effect: there is no such model", rule["model_name"])
        except LocalAIError as error:
            raise StartupError(f"the scheduling rule for model '{rule['model_name']}': {error.message}") from error


def _inline(settings: Settings) -> Any:
    try:
        return json.loads(settings.model_scheduling or "[]")
    except ValueError as error:
        raise StartupError(f"{INLINE} is no JSON: {error}") from error


def _from_file(settings: Settings) -> Any:
    path = settings.model_scheduling_config
    assert path is not None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartupError(f"{FILE}: cannot read {path}: {' '.join(str(error).split())}") from error
