"""What is remembered of who has read which beginning: what matches, for how long, and how much of it is kept."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.affinity import HEAD, MOST_SIGHTINGS, MOST_WINDOWS, WINDOW, Prefixes, chain_of, head_of
from localai_q.cluster.requests import GenerationRequest

KEY = b"secret"
MOST = 65_536


def chain(text: str, *, model_id: str = "m1", key: bytes = KEY):
    return chain_of(text.encode(), key=key, model_id=model_id)


def chat(*messages: tuple[str, object], **body: object) -> bytes:
    said = [{"role": role, "content": content} for role, content in messages]
    return head_of(GenerationRequest(kind="chat", model="m", body={"messages": said, **body}))


class TestChains:
    def test_equal_beginnings_share_their_links_and_no_others(self) -> None:
        one, two = chain("a" * 600 + "b" * 400), chain("a" * 600 + "c" * 400)
        assert len(one) == len(two) == 3
        assert one[:2] == two[:2]
        assert one[2] != two[2]

    def test_a_link_covers_all_that_is_before_it(self) -> None:
        assert chain("a" * WINDOW + "z" * WINDOW)[1] != chain("b" * WINDOW + "z" * WINDOW)[1]

    def test_what_does_not_fill_a_window_is_left_out(self) -> None:
        assert chain("a" * (WINDOW - 1)) == ()
        assert chain("a" * (2 * WINDOW - 1)) == chain("a" * WINDOW)

    def test_only_the_head_counts(self) -> None:
        assert len(chain("a" * (HEAD * 3))) == MOST_WINDOWS

    def test_models_and_secrets_keep_chains_apart(self) -> None:
        assert set(chain("a" * 900)).isdisjoint(chain("a" * 900, model_id="m2"))
        assert set(chain("a" * 900)).isdisjoint(chain("a" * 900, key=b"another"))


class TestHeads:
    def test_a_conversation_begins_like_its_earlier_turns(self) -> None:
        first = chat(("system", "be brief"), ("user", "hello"))
        assert chat(("system", "be brief"), ("user", "hello"), ("assistant", "hi")).startswith(first)

    def test_roles_are_part_of_it(self) -> None:
        assert chat(("user", "x")) != chat(("system", "x"))

    def test_parts_are_not_mixed_up(self) -> None:
        assert chat(("user", "ab"), ("user", "c")) != chat(("user", "a"), ("user", "bc"))

    def test_tools_come_before_the_messages(self) -> None:
        with_tools = chat(("user", "hello"), tools=[{"type": "function"}])
        assert with_tools.startswith(b'[{"type": "function"}]')
        assert with_tools.endswith(chat(("user", "hello")))

    def test_content_in_parts_is_read_too(self) -> None:
        assert b"what is this" in chat(("user", [{"type": "text", "text": "what is this"}]))

    def test_a_completion_begins_with_its_first_prompt(self) -> None:
        texts = GenerationRequest(kind="completion", model="m", inputs=("once upon", "other"))
        tokens = GenerationRequest(kind="completion", model="m", inputs=((1, 22),))
        assert head_of(texts) == b"once upon"
        assert head_of(tokens) == b"[1, 22]"

    def test_an_embedding_has_none(self) -> None:
        assert head_of(GenerationRequest(kind="embedding", model="m", inputs=("a text",))) == b""

    def test_no_more_is_read_than_counts(self) -> None:
        assert len(chat(*[("user", "ü" * 5000)] * 50)) == HEAD

    @given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=40)), min_size=1, max_size=6))
    def test_more_messages_never_change_what_came_before(self, messages) -> None:
        assert chat(*messages).startswith(chat(*messages[:-1]))


class TestTable:
    def test_the_part_that_was_read_is_told_for_each_replica(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        table.observe(chain("a" * 1024), "r1", 0.0)
        table.observe(chain("a" * 512 + "b" * 512), "r2", 0.0)
        assert table.match(chain("a" * 1024), 1.0) == {"r1": 1.0, "r2": 0.5}
        assert table.match(chain("a" * 2048), 1.0) == {"r1": 0.5, "r2": 0.25}
        assert table.match(chain("z" * 1024), 1.0) == {}

    def test_a_short_prompt_matches_nobody(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        assert not table.observe((), "r1", 0.0)
        assert table.match((), 0.0) == {}

    def test_a_sighting_counts_for_its_time(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        table.observe(chain("a" * 512), "r1", 0.0)
        assert table.match(chain("a" * 512), 299.9)
        assert table.match(chain("a" * 512), 300.0) == {}

    def test_what_has_expired_is_dropped(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        table.observe(chain("a" * 512), "r1", 0.0)
        table.observe(chain("b" * 512), "r1", 301.0)
        assert len(table) == 2

    def test_a_replica_that_goes_is_forgotten_and_begins_anew_when_it_is_back(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        table.observe(chain("a" * 512), "r1", 0.0)
        table.observe(chain("a" * 512), "r2", 0.0)
        table.forget("r1")
        assert table.match(chain("a" * 512), 1.0) == {"r2": 1.0}
        assert table.holders == {"r2"}
        table.observe(chain("a" * 256), "r1", 2.0)
        assert table.match(chain("a" * 512), 3.0) == {"r2": 1.0, "r1": 0.5}

    def test_what_others_know_is_not_told_again_until_it_ages(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        assert table.observe(chain("a" * 512), "r1", 0.0)
        assert not table.observe(chain("a" * 512), "r1", 60.0)
        assert table.observe(chain("a" * 512), "r2", 61.0)
        assert table.observe(chain("a" * 768), "r1", 62.0)
        assert table.observe(chain("a" * 512), "r1", 200.0)

    def test_what_was_seen_longest_ago_makes_room(self) -> None:
        table = Prefixes(ttl=300, most=4)
        table.observe(chain("a" * 512), "r1", 0.0)
        table.observe(chain("b" * 512), "r1", 1.0)
        table.observe(chain("a" * 512), "r1", 2.0)
        table.observe(chain("c" * 512), "r1", 3.0)
        assert table.match(chain("a" * 512), 4.0)
        assert not table.match(chain("b" * 512), 4.0)

    def test_a_link_remembers_the_latest_replicas(self) -> None:
        table = Prefixes(ttl=300, most=MOST)
        for number in range(10):
            table.observe(chain("a" * 512), f"r{number}", float(number))
        assert set(table.match(chain("a" * 512), 10.0)) == {f"r{9 - back}" for back in range(MOST_SIGHTINGS)}

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 400)), max_size=60))
    def test_it_stays_within_its_bounds_and_tells_only_what_it_saw(self, seen) -> None:
        table, now, told = Prefixes(ttl=300, most=10), 0.0, set()
        for replica, letter, later in seen:
            now += later
            table.observe(chain(chr(97 + letter) * 1024), f"r{replica}", now)
            told.add((f"r{replica}", letter))
            assert len(table) <= 10
        for letter in range(10):
            for replica_id, part in table.match(chain(chr(97 + letter) * 1024), now).items():
                assert (replica_id, letter) in told
                assert 0 < part <= 1

    def test_an_entry_takes_less_than_four_hundred_bytes(self) -> None:
        chains = [chain(f"{number:4}" * 64 * 16) for number in range(1000)]
        tracemalloc.start()
        table = Prefixes(ttl=300, most=MOST)
        before = tracemalloc.get_traced_memory()[0]
        for each in chains:
            table.observe(tuple(bytes(link) for link in each), "r1", 0.0)
        taken = (tracemalloc.get_traced_memory()[0] - before) / len(table)
        tracemalloc.stop()
        assert taken < 400, taken
