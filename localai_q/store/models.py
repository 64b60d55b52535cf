"""Queries on models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, delete, null, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.models import Facts, Model, ModelConfig
from localai_q.cluster.wishes import Unmet
from localai_q.names import new_id
from localai_q.store.tables import models


def add(
    db: Connection, name: str, config: ModelConfig, *, is_default: bool = False, facts: Facts | None = None
) -> Model | None:
    """Register a model; None if the name is taken."""
    values = {"id": new_id(), "name": name, "backend": config.backend, "config": config.model_dump(mode="json"),
              "is_default": is_default, "facts": asdict(facts) if facts else null()}  # fmt: skip
    row = db.execute(upsert(models).values(values).on_conflict_do_nothing().returning(models)).one_or_none()
    return _model(row) if row else None


def by_name(db: Connection, name: str) -> Model | None:
    row = db.execute(select(models).where(models.c.name == name)).one_or_none()
    return _model(row) if row else None


def by_id(db: Connection, model_id: str) -> Model | None:
    row = db.execute(select(models).where(models.c.id == model_id)).one_or_none()
    return _model(row) if row else None


def every(db: Connection) -> list[Model]:
    return [_model(row) for row in db.execute(select(models).order_by(models.c.name))]


def held(db: Connection, model_ids: Collection[str]) -> dict[str, Model]:
    """Those of these models that exist, by id; they do until the transaction ends."""
    query = select(models).where(models.c.id.in_(sorted(model_ids))).order_by(models.c.id)
    return {row.id: _model(row) for row in db.execute(query.with_for_update(read=True, key_share=True))}


def revision(db: Connection, model_id: str | None) -> int:
    """The model's revision now; 0 if there is no such model."""
    found = db.execute(select(models.c.revision).where(models.c.id == model_id)).scalar_one_or_none()
    return int(found or 0)


def change(db: Connection, before: Model, after: Model) -> bool:
    """Let a model be otherwise; False if it is not any more as it was before."""
    row = db.execute(select(models).where(models.c.id == before.id).with_for_update()).one_or_none()
    if row is None or _model(row) != before:
        return False
    facts = asdict(after.facts) if after.facts else null()
    values = {"revision": after.revision, "backend": after.config.backend, "facts": facts,
              "config": after.config.model_dump(mode="json")}  # fmt: skip
    db.execute(update(models).where(models.c.id == before.id).values(values))
    return True


def learn(db: Connection, model: Model, facts: Facts) -> None:
    """Note what the header of the model's file says, unless it has another file by now."""
    same = (models.c.id == model.id) & (models.c.revision == model.revision)
    db.execute(update(models).where(same).values(facts=asdict(facts)))


def note(db: Connection, model_id: str, unmet: Unmet | None) -> None:
    """Note that the model's wish for replicas cannot be met; None: that it can."""
    record = unmet.model_dump(mode="json") if unmet else null()
    db.execute(update(models).where(models.c.id == model_id).values(unmet=record))


def learn_contents(db: Connection, model: Model, contents: Sequence[Mapping[str, Any]]) -> ModelConfig | None:
    """Note what the files of a model are of which that was not known; what it is configured with by now.

    Args:
        contents: what was fetched for this revision of the model, as `ModelConfig.knowing` takes it.

    Returns:
        None if the model is gone, or has other files.

    Raises:
        ValueError: that is nothing that a file could be.
    """
    same = (models.c.id == model.id) & (models.c.revision == model.revision)
    row = db.execute(select(models).where(same).with_for_update()).one_or_none()
    if row is None:
        return None
    config = _model(row).config.knowing(contents)
    db.execute(update(models).where(same).values(config=config.model_dump(mode="json")))
    return config


def remove(db: Connection, model_id: str) -> None:
    db.execute(delete(models).where(models.c.id == model_id))


def _model(row: Row[Any]) -> Model:
    return Model(
        id=row.id,
        name=row.name,
        revision=row.revision,
        config=ModelConfig.model_validate(row.config),
        is_default=row.is_default,
        created=row.created_at.timestamp(),
        facts=Facts.from_json(row.facts) if row.facts else None,
        unmet=Unmet.model_validate(row.unmet) if row.unmet else None,
    )
