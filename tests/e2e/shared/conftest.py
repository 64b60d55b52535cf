"""The cluster of this folder's tests: one serves them all. A test that stops or crowds one starts its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_cluster import Cluster, until
from waiting import LIMIT


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
def calm(cluster: Cluster) -> Cluster:
    """The shared cluster with nothing at work and both echo models loaded."""
    until(lambda: not cluster.open_generations(), LIMIT, "the end of what earlier tests asked for")
    for model in ("echo", "echo-one"):
        cluster.until_serving(model)
    until(lambda: not cluster.open_generations(), LIMIT, "the end of the warm-up")
    return cluster
