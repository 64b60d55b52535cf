"""What many tests of this folder begin with: a node in the registry, leases, a server of files, and the API over HTTP."""

from collections.abc import Iterator

import httpx
import pytest
import redis
from cluster_data import api_over_http, ready_node
from file_server import FileServer, serve
from leased_jobs import JOURNAL_MAX

from localai_q.bus.leases import Leases
from localai_q.cluster.nodes import Node
from localai_q.services import keys
from localai_q.services.wiring import Services


@pytest.fixture
def node(services: Services) -> Node:
    return ready_node(services)


@pytest.fixture
def leases(redis_client: redis.Redis) -> Leases:
    return Leases(redis_client, lease=30.0, journal_ttl=60.0, journal_max=JOURNAL_MAX)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as found:
        yield found


@pytest.fixture
def http(services: Services) -> Iterator[httpx.Client]:
    """An admin's client of the API."""
    headers = {"Authorization": f"Bearer {keys.create(services, name='a', role='admin')[1]}"}
    with api_over_http(services) as url, httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        yield client
