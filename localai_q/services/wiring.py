"""Puts a process's stores, bus and settings together, once. Every use case takes the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localai_q.bus.connection import client
from localai_q.bus.doorbells import Doorbells
from localai_q.bus.leases import Leases
from localai_q.config import Settings
from localai_q.store.engine import Database


@dataclass(frozen=True)
class Services:
    """What a use case acts through."""

    settings: Settings
    db: Database
    redis: Any  # redis.Redis
    leases: Leases
    doorbells: Doorbells


def connect(settings: Settings) -> Services:
    """The services of this process; nothing is contacted yet.

    Raises:
        StartupError: no database or no Redis is named.
    """
    from localai_q.celery import app  # the application reads the settings when it is imported

    settings.require_stores()
    redis = client(settings.redis_url)
    leases = make_leases(redis, settings)
    return Services(settings, Database(settings.database_url), redis, leases, Doorbells(app))


def make_leases(redis: Any, settings: Settings) -> Leases:
    """Leases with this cluster's numbers."""
    return Leases(redis, lease=settings.lease, journal_ttl=settings.journal_ttl, journal_max=settings.journal_max)
