"""Names that processes agree on cannot be mistaken for each other, nor reach further than they should."""

import inspect
import re

from hypothesis import given
from hypothesis import strategies as st

from localai_q import names

ids = st.from_regex(r"\A[a-z0-9]{1,16}\Z")
MAKERS = [
    made
    for name, made in inspect.getmembers(names, inspect.isfunction)
    if made.__module__ == names.__name__ and inspect.signature(made).parameters
]
OF_IDS = [made for made in MAKERS if next(iter(inspect.signature(made).parameters)) not in ("queue", "owner")]
QUEUES = [names.model_queue, names.replica_queue, names.node_queue, names.node_jobs_queue]


def test_an_id_is_sixteen_lower_letters_and_digits_and_never_the_same() -> None:
    made = [names.new_id() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert all(re.fullmatch(r"[a-z0-9]{16}", each) for each in made)
    assert len(set("".join(made))) == 32  # every letter of the alphabet is used


def test_every_function_of_the_module_is_looked_at_here() -> None:
    assert len(OF_IDS) >= 7
    assert set(QUEUES) <= set(OF_IDS)


@given(ids, ids)
def test_no_name_of_one_id_is_the_name_of_another_or_of_another_kind(one, other) -> None:
    made = [maker(one) for maker in OF_IDS]
    assert len(set(made)) == len(made)
    if one != other:
        assert not set(made) & {maker(other) for maker in OF_IDS}


@given(ids, ids)
def test_a_pattern_that_grants_what_belongs_to_one_id_grants_nothing_of_another(one, other) -> None:
    # A grant of everything of an id is its name followed by a separator and '*'.
    for maker in OF_IDS:
        for separator in (".", ":"):
            grant = maker(one) + separator
            if one != other:
                assert not any(each(other).startswith(grant) for each in OF_IDS)


@given(ids)
def test_a_name_is_its_kind_and_its_id_and_nothing_that_a_pattern_gives_a_meaning(one) -> None:
    for maker in OF_IDS:
        assert one in re.split(r"[.:-]", maker(one))
        assert re.fullmatch(r"[a-z0-9.:-]+", maker(one))


@given(ids, ids)
def test_keys_about_a_line_tell_lines_apart(one, other) -> None:
    lines = [maker(each) for maker in QUEUES for each in {one, other}]
    for maker in (names.waiting_key, names.leases_key, names.dead_letters):
        assert len({maker(line) for line in lines}) == len(set(lines))
    assert not {names.waiting_key(line) for line in lines} & {names.leases_key(line) for line in lines}


def test_no_fixed_name_is_that_of_an_id() -> None:
    fixed = {names.CONTROL_QUEUE, names.ENDS_CHANNEL, names.WAKE_CHANNEL}
    assert not fixed & {maker("control") for maker in OF_IDS}
    assert all(":" not in each and "." not in each for each in fixed)


def test_every_task_has_a_name_of_its_own() -> None:
    tasks = [names.RUN_GENERATION, names.RUN_JOB, names.START_REPLICA, names.STOP_REPLICA]
    assert len(set(tasks)) == len(tasks)
    assert all(task.startswith("localai_q.") for task in tasks)
