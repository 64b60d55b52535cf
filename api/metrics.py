"""Counters of the web processes and gauges of the cluster, for Prometheus.

With several web processes the counters are shared through files (prometheus_client's multiprocess mode); the gauges are
read from the stores when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from localai_q.cluster.events import End
from localai_q.services import status
from localai_q.services.wiring import Services

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

LABELS = {
    "localai_jobs": ("Jobs by kind and state.", ["kind", "state"]),
    "localai_nodes": ("Nodes by state.", ["state"]),
    "localai_replicas": ("Replicas by model and state.", ["model", "state"]),
    "localai_jobs_waiting": ("Jobs in line, by model.", ["model"]),
    "localai_jobs_running": ("Jobs at work, by model.", ["model"]),
}


class Metrics:
    """The counters of this process."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("localai_requests", "HTTP requests.", ["endpoint", "status"], **own)
        self.first_token = Histogram(
            "localai_time_to_first_token_seconds", "From request to first token.", ["model"], buckets=SECONDS, **own
        )
        self.duration = Histogram(
            "localai_generation_seconds", "From request to end.", ["model"], buckets=SECONDS, **own
        )
        self.tokens = Counter("localai_tokens", "Tokens of ended generations.", ["model", "type"], **own)

    def count_end(self, model: str, end: End, seconds: float) -> None:
        """A generation that was followed here has ended, so many seconds after its following began."""
        self.duration.labels(model).observe(seconds)
        self.tokens.labels(model, "prompt").inc(end.usage.prompt)
        self.tokens.labels(model, "completion").inc(end.usage.completion)

    def render(self, multiprocess: bool) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Cluster(self._services))  # type: ignore[arg-type]
        if multiprocess:
            MultiProcessCollector(registry)
            return bytes(generate_latest(registry))
        return bytes(generate_latest(self._registry)) + bytes(generate_latest(registry))


class _Cluster:
    """Reads the gauges when Prometheus asks."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Any]:
        for name, values in status.gauges(self._services).items():
            text, labels = LABELS[name]
            family = GaugeMetricFamily(name, text, labels=labels)
            for key, value in values.items():
                family.add_metric(list(key), value)
            yield family
