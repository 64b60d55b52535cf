"""The simulator's own books: nothing is counted twice or forgotten, and nothing holds more than it has."""

import collections
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bench.simulation import comparison
from bench.simulation.clock import Clock
from bench.simulation.control import Control
from bench.simulation.copies import Cache, Copy, Job
from bench.simulation.fleet import MOST_COPIES, Scenario, make_machines, make_models, shares
from bench.simulation.ours import Ours, View
from bench.simulation.policies import LeastInFlight, Policy, Random, RoundRobin
from bench.simulation.run import simulate
from bench.simulation.serving import Serving
from bench.simulation.tally import Integral, Tally, quantile
from bench.simulation.trace import CONTEXT, Request, make_trace

SMALL = Scenario(nodes=10, models=10, seconds=120.0, failing=0.3)


def request(
    conversation: int = 1, *, system: int = 1, history: int = 100, prompt: int = 200, answer: int = 50
) -> Request:
    return Request(0.0, "m", conversation, system, 100, history, prompt, answer)


@pytest.mark.parametrize("policy", [Ours, Policy, LeastInFlight, RoundRobin, Random])
def test_every_request_ends_once(policy) -> None:
    trace = make_trace(SMALL)
    tally = simulate(SMALL, trace, policy())
    assert tally.arrived == len(trace) > 500
    assert tally.finished + tally.lost == tally.arrived
    assert len(tally.waits) == len(tally.first_tokens) == tally.finished
    assert min(tally.waits) >= 0
    assert all(first > wait for first, wait in zip(tally.first_tokens, tally.waits, strict=True))
    assert 0 < tally.utilisation <= 1
    assert 0 < tally.cached_tokens < tally.prompt_tokens


def test_what_a_dead_machine_held_is_lost_only_where_nobody_takes_it_up() -> None:
    trace = make_trace(SMALL)
    ours, pushed = simulate(SMALL, trace, Ours()), simulate(SMALL, trace, RoundRobin())
    assert (ours.lost, pushed.continued) == (0, 0)
    assert ours.continued > 0
    assert pushed.lost > 0


def test_the_same_numbers_give_the_same_run() -> None:
    first, second = (simulate(SMALL, make_trace(SMALL), LeastInFlight()) for _ in range(2))
    assert first.waits == second.waits
    assert make_trace(SMALL) != make_trace(replace(SMALL, seed=2))


def test_a_model_that_is_not_loaded_is_loaded_for_who_waits() -> None:
    scenario = replace(SMALL, failing=0.0)
    rare = {model.id for model in make_models(scenario) if not model.config.min_replicas}
    trace = [each for each in make_trace(scenario) if each.model_id in rare]
    tally = simulate(scenario, trace, Ours())
    assert tally.loads >= len({each.model_id for each in trace}) > 0
    assert max(tally.waits) > 4.0  # the smallest is fetched in as many seconds


def test_a_copy_takes_no_more_than_it_has_slots() -> None:
    copy = Copy("r", "m", 10.0, 1)
    copy.begin(Job(request()), 0.0)
    with pytest.raises(AssertionError, match="no free slot"):
        copy.begin(Job(request()), 0.0)


def test_a_machine_holds_no_more_than_it_has() -> None:
    clock, tally = Clock(), Tally()
    models = make_models(SMALL)
    control = Control(clock, SMALL, make_machines(SMALL), models, Serving(clock, Ours(), tally), tally)
    with pytest.raises(AssertionError, match="over-booked"):
        collections.deque(
            control._place(models[0].id, "n00000") for _ in range(21)
        )  # of at least 4 GB, where the largest has 80


def test_time_in_a_slot_is_reading_what_is_not_known_and_writing() -> None:
    copy = Copy("r", "m", 10.0, 1)  # writes 10 tokens/s, reads 200
    job = Job(request(prompt=200, answer=50))
    assert copy.begin(job, 0.0) == pytest.approx((1.0 + 0.1, 1.0 + 5.0))
    copy.running.clear()
    following = Job(request(history=250, prompt=450, answer=50))
    assert copy.begin(following, 9.0)[1] == pytest.approx(1.0 + 5.0)
    assert (job.cached, following.cached) == (0, 250)


def test_a_cache_knows_system_prompts_of_conversations_that_it_still_has() -> None:
    cache = Cache(2)
    assert [cache.use(request(1)), cache.use(request(2)), cache.use(request(3, system=2))] == [0, 100, 0]
    assert cache.use(request(1, history=250)) == 100  # forgotten, but for the system prompt that the second shares
    assert cache.use(request(4, system=2)) == 100
    assert cache.use(request(5, system=3)) == 0


def test_traces_are_in_order_and_conversations_grow() -> None:
    trace = make_trace(SMALL)
    assert trace == sorted(trace, key=lambda each: each.at)
    assert all(each.history < each.prompt and each.prompt + each.answer <= CONTEXT for each in trace)
    turns: dict[int, Request] = {}
    for each in trace:
        before = turns.get(each.conversation)
        assert before is None or before.prompt + before.answer == each.history
        turns[each.conversation] = each
    assert len(turns) < len(trace)


@pytest.mark.parametrize(("nodes", "models"), [(10, 10), (1000, 60), (10_000, 300)])
def test_no_model_is_asked_for_more_than_its_copies_can_be(nodes: int, models: int) -> None:
    scenario = Scenario(nodes=nodes, models=models, seconds=1.0)
    found = shares(scenario)
    assert sum(found) == pytest.approx(1.0)
    assert found == sorted(found, reverse=True)
    assert found[0] * nodes * scenario.copies <= MOST_COPIES * 1.001


def test_means_and_quantiles() -> None:
    busy = Integral()
    for now, change in ((1.0, 2), (3.0, -1), (5.0, 0)):
        busy.add(now, change)
    assert busy.total == pytest.approx(2 * 2 + 1 * 2)
    assert [quantile(range(100), part) for part in (0.5, 0.99)] == [50, 99]
    assert quantile([], 0.5) == 0.0


def test_a_web_process_knows_its_own_requests_at_once_and_those_of_others_when_it_reads() -> None:
    view, mine, other = View(), Job(request()), Job(request())
    view.add(mine, "r1")
    view.add(other, "")
    assert (view.load(0.0).in_flight["r1"], view.load(0.0).waiting) == (1, 1)
    view.taken(other, "r2")
    view.refresh({"r2": 1, "r3": 4}, waiting=3, now=1.0)
    assert dict(view.load(0.0).in_flight) == {"r1": 1, "r2": 1, "r3": 4}
    assert view.load(0.0).waiting == 2
    view.taken(mine, "r1")
    view.ended("r2")
    assert [view.load(0.0).in_flight[each] for each in ("r1", "r2")] == [1, 0]


def test_later_turns_go_where_the_earlier_ones_were_read() -> None:
    scenario = replace(SMALL, failing=0.0)
    trace = make_trace(scenario)
    cached = {policy.name: simulate(scenario, trace, policy()).cached_tokens for policy in (Ours, Policy)}
    assert cached[Ours.name] > 1.2 * cached[Policy.name]


def test_a_comparison_prints_a_line_for_each_policy_and_makes_a_picture(capsys, tmp_path) -> None:
    fleets = [replace(SMALL, seconds=20.0), replace(SMALL, nodes=20, seconds=20.0)]
    found = {fleet: comparison.compare(fleet, (Ours, LeastInFlight)) for fleet in fleets}
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip().partition("  ")[0] for line in lines].count("localai_q") == 2
    assert len({len(line) for line in lines if "nodes," not in line}) == 1
    comparison.picture(tmp_path / "picture.svg", found)
    words = [each.text for each in ElementTree.parse(tmp_path / "picture.svg").iter() if each.text]
    assert {"localai_q", "least in flight", "p99", "10 nodes"} <= set(words)
