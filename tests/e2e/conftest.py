"""The cluster of this folder's tests. One serves the whole session; a test that stops or crowds one starts its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_cluster import Cluster, Joiner, folder_of_homes, until
from waiting import LIMIT


@pytest.fixture(scope="session")
def homes() -> Iterator[Path]:
    with folder_of_homes("lqe2e") as folder:
        yield folder


@pytest.fixture(scope="session")
def weights(cluster: Cluster) -> Path:
    """The default model's file, as the node has fetched it."""
    return next((cluster.home / "worker" / "nodes" / "alpha" / "models" / "blobs").glob("[0-9a-f]*"))


@pytest.fixture(scope="session")
def cluster(homes: Path) -> Iterator[Cluster]:
    """The cluster that most tests share: the default model, `echo` with four slots, `echo-one` with one."""
    made = Cluster(homes / "shared")
    made.start()
    try:
        made.cli("models", "add", "echo", "--backend", "echo", "--slots", "4", "--spread")
        made.cli("models", "add", "echo-one", "--backend", "echo", "--slots", "1")
        made.until_serving("echo")
        yield made
    except BaseException as error:
        error.add_note(made.logs())
        made.kill()
        raise
    made.stop()


@pytest.fixture(scope="session")
def vectors(cluster: Cluster, weights: Path) -> str:
    """A model that embeds, made of an uploaded file."""
    cluster.cli("models", "add", "vectors", "--file", str(weights), "--embeddings", "--context-size", "256")
    return "vectors"


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


@pytest.fixture
def calm(cluster: Cluster) -> Cluster:
    """The shared cluster with nothing at work and both echo models loaded."""
    until(lambda: not cluster.open_generations(), LIMIT, "the end of what earlier tests asked for")
    for model in ("echo", "echo-one"):
        cluster.until_serving(model)
    until(lambda: not cluster.open_generations(), LIMIT, "the end of the warm-up")
    return cluster
