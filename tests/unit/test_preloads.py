"""When the files of a model are fetched before anybody asks."""

import pytest

from localai_q.cluster.backends import MOST_ATTEMPTS, pause
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import ModelConfig
from localai_q.cluster.preloads import SETTLES, Standing, standing
from localai_q.cluster.states import JobState

A, B = "a" * 64, "b" * 64
NOW = 10_000.0
CONFIG = ModelConfig(source="ollama://x", sha256=A, loras=[{"source": "ollama://y", "sha256": B}])


def fetch(state: JobState, age: float = 0.0) -> Job:
    ended = None if state is JobState.OPEN else NOW - age
    return Job(id="j", kind="fetch_model", state=state, line="node.n.jobs", ended=ended)


@pytest.mark.parametrize(
    ("on_nodes", "fetches", "stands"),
    [
        ([], [], Standing.DUE),
        ([[A], [B]], [], Standing.DUE),
        ([[B], [B, A]], [], Standing.THERE),
        ([], [fetch(JobState.OPEN)], Standing.COMING),
        ([], [fetch(JobState.DONE, SETTLES - 1)], Standing.COMING),
        ([], [fetch(JobState.DONE, SETTLES + 1)], Standing.DUE),
        ([], [fetch(JobState.CANCELLED, 9999)], Standing.GIVEN_UP),
        ([], [fetch(JobState.FAILED, pause(1) - 1)], Standing.WAITING),
        ([], [fetch(JobState.FAILED, pause(1) + 1)], Standing.DUE),
        ([], [fetch(JobState.FAILED, pause(1) + 1)] * 2, Standing.WAITING),
        ([], [fetch(JobState.FAILED, pause(1) + 1), fetch(JobState.DONE), fetch(JobState.FAILED)], Standing.DUE),
        ([], [fetch(JobState.FAILED, 99_999)] * MOST_ATTEMPTS, Standing.GIVEN_UP),
    ],
)
def test_how_it_stands(on_nodes, fetches, stands) -> None:
    assert standing(CONFIG, on_nodes, fetches, NOW) == stands


def test_a_file_of_which_nothing_is_known_is_nowhere() -> None:
    unknown = CONFIG.model_copy(update={"sha256": None})
    assert standing(unknown, [[A, B]], [], NOW) is Standing.DUE
