"""What end-to-end tests make: clusters and nodes of their own. Tests that share one cluster lie in `shared`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_cluster import Cluster, Joiner, folder_of_homes


@pytest.fixture(scope="session")
def homes() -> Iterator[Path]:
    with folder_of_homes("lqe2e") as folder:
        yield folder


@pytest.fixture
def start_cluster(homes: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of the test's own; whatever the test leaves running is killed."""
    made: list[Cluster] = []

    def start(*arguments: str, **settings: str) -> Cluster:
        own = Cluster(homes / f"own{len(list(homes.iterdir()))}", *arguments, **settings)
        made.append(own)
        own.start()
        return own

    yield start
    for own in made:
        own.kill()


@pytest.fixture
def join(homes: Path) -> Iterator[Callable[..., Joiner]]:
    """Makes nodes; whatever the test leaves running is killed."""
    made: list[Joiner] = []

    def start(name: str, **settings: str) -> Joiner:
        made.append(Joiner(homes / f"node-{name}", name, **settings))
        return made[-1]

    yield start
    for each in made:
        each.kill()
