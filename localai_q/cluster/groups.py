"""Models that exclude each other: those that share a name among their `concurrency_groups`. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from localai_q.cluster.models import Model


def rivals_of(model: Model, known: Iterable[Model]) -> dict[str, str]:
    """The models that must not be on one node with this one, name by id."""
    groups = set(model.config.concurrency_groups)
    if not groups:
        return {}
    return {
        other.id: other.name
        for other in known
        if other.id != model.id and not groups.isdisjoint(other.config.concurrency_groups)
    }
