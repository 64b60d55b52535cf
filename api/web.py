"""What a web process holds: its services, the streams of its clients, its memory of keys, of the registry and of where requests go,
its counters."""

from __future__ import annotations

from dataclasses import dataclass

from flask import current_app, g

from api.metrics import Metrics
from api.streams import Streams
from localai_q.config import Settings
from localai_q.services import uploads
from localai_q.services.keys import Authenticator
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services, connect
from localai_q.store.keys import ApiKey


@dataclass(frozen=True)
class Web:
    """One per web process."""

    services: Services
    streams: Streams
    snapshots: Snapshots
    router: Router
    authenticator: Authenticator
    metrics: Metrics

    def stop(self) -> None:
        """End all streams, so that clients can come back to other processes, and what goes on in the background."""
        self.streams.stop()
        self.router.stop()
        self.snapshots.stop()


def make_web(settings: Settings) -> Web:
    """Connect a web process."""
    services = connect(settings)
    uploads.sweep(services)
    metrics, snapshots = Metrics(services), Snapshots(services)
    router = Router(services, snapshots)
    snapshots.start()
    router.start()
    return Web(
        services=services,
        streams=Streams(services, snapshots, router, metrics),
        snapshots=snapshots,
        router=router,
        authenticator=Authenticator(services),
        metrics=metrics,
    )


def web() -> Web:
    """The web process that serves this request."""
    found: Web = current_app.extensions["localai_q"]
    return found


def caller() -> ApiKey:
    """The key that this request was sent with."""
    key: ApiKey = g.key
    return key
