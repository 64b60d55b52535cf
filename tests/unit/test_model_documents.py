"""What a model's document says besides its file: further files, what it adds to requests, and how it is written down."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.openai.schemas import parse_chat, parse_completion, parse_embedding
from localai_q.cluster.defaults import with_defaults
from localai_q.cluster.disk import unnamed
from localai_q.cluster.memory import need
from localai_q.cluster.models import AROUND_REPLICAS, Adapter, Document, File, Model, ModelConfig
from localai_q.cluster.sampling import Parameters, Sampling
from localai_q.documents import MOST_VALUES, checked, read_yaml
from localai_q.errors import InvalidRequest, InvalidValue, UnknownParameter

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
HUB = "huggingface://o/r/{}.gguf"


def config(**fields: object) -> ModelConfig:
    return ModelConfig(**{"source": HUB.format("own"), **fields})


def adapted(**own: object) -> ModelConfig:
    return config(draft_model=File(source=HUB.format("draft"), sha256=B, size=20),
                  loras=(Adapter(source=HUB.format("x"), scale=0.5), Adapter(source=HUB.format("y"), sha256=C, size=5)),
                  **own)  # fmt: skip


class TestFiles:
    def test_the_models_own_comes_first(self) -> None:
        assert [file.source for file in adapted(sha256=A).files] == [HUB.format(n) for n in ("own", "draft", "x", "y")]
        assert adapted(sha256=A).contents == {A, B, C}
        assert ModelConfig(backend="echo").files == ()

    def test_what_was_fetched_is_learned_where_it_was_not_known(self) -> None:
        told = [{"sha256": A, "size": 100}, {"sha256": A, "size": 1}, {"sha256": "d" * 64, "size": 7}, {"sha256": A}]
        known = adapted().knowing(told)
        assert (known.sha256, known.size) == (A, 100)
        assert known.draft_model == adapted().draft_model
        assert known.loras == (Adapter(source=HUB.format("x"), sha256="d" * 64, size=7, scale=0.5), adapted().loras[1])
        assert known.knowing([{"sha256": B, "size": 1}]) == known

    @pytest.mark.parametrize("content", [{"sha256": "no", "size": 1}, {"sha256": A, "size": -1}, {"sha256": A}])
    def test_nonsense_is_not_learned(self, content: dict) -> None:
        with pytest.raises(ValueError, match="validation error"):
            config().knowing([content])

    def test_what_is_known_of_a_file_stays_known_when_the_model_is_written_down_anew(self) -> None:
        known = adapted(sha256=A, size=100)
        anew = config(loras=(Adapter(source=HUB.format("y")),), slots=9).like(known)
        assert (anew.sha256, anew.size, anew.slots, anew.loras) == (A, 100, 9, (known.loras[1],))
        assert config(source=HUB.format("other")).like(known).sha256 is None
        assert config(sha256=A).like(known).size == 100
        assert config(sha256=B).like(known).size == 0

    def test_they_need_a_model(self) -> None:
        with pytest.raises(ValueError, match="give 'source'"):
            ModelConfig(backend="echo", mmproj=File(source=HUB.format("x")))

    def test_they_are_kept_where_they_lie(self) -> None:
        model = Model(id="m", name="m", revision=1, config=adapted(sha256=A))
        assert unnamed({A, B, C, "d" * 64}, [model]) == ["d" * 64]

    def test_they_take_memory(self) -> None:
        small, large = (
            need(config(size=1000), None, 0),
            need(config(size=1000, mmproj=File(source="x", size=500)), None, 0),
        )
        assert small
        assert large
        assert large.memory.ram == small.memory.ram * 1.5

    def test_another_one_makes_another_replica(self) -> None:
        assert not adapted().makes_same_replica(config())
        assert not config(chat_template="x").makes_same_replica(config())
        assert config(parameters={"top_k": 1}, system_prompt="x", disabled=True).makes_same_replica(config())


def chat(**body: object):
    return parse_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **body}).encode())


class TestDefaults:
    def test_they_are_used_where_a_request_does_not_say_it(self) -> None:
        own = config(parameters={"temperature": 0.2, "top_k": 3, "stop": "END", "seed": -1, "max_tokens": 9})
        body = with_defaults(chat(temperature=1.5, max_completion_tokens=4), own).body
        assert {name: body[name] for name in ("temperature", "top_k", "stop", "max_tokens")} == {
            "temperature": 1.5, "top_k": 3, "stop": ["END"], "max_tokens": 4}  # fmt: skip
        assert body["seed"] == with_defaults(chat(seed=-1), config()).body["seed"] >= 0
        assert with_defaults(chat(), config()) == chat()

    def test_a_completion_has_openais_default_length_unless_its_model_has_one(self) -> None:
        asked = parse_completion(b'{"model": "m", "prompt": "a"}')
        assert with_defaults(asked, config()).body == {"max_tokens": 16}
        assert with_defaults(asked, config(parameters={"max_tokens": 99})).body == {"max_tokens": 99}
        longer = parse_completion(b'{"model": "m", "prompt": "a", "max_tokens": 5}')
        assert with_defaults(longer, config(parameters={"max_tokens": 99})).body == {"max_tokens": 5}

    def test_what_is_embedded_stays_as_it_is(self) -> None:
        asked = parse_embedding(b'{"model": "m", "input": "a"}')
        assert with_defaults(asked, config(parameters={"temperature": 1}, system_prompt="x")) == asked

    def test_a_chat_without_a_system_prompt_gets_the_models(self) -> None:
        own = config(system_prompt="Be brief.")
        assert [m["role"] for m in with_defaults(chat(), own).body["messages"]] == ["system", "user"]
        for role in ("system", "developer"):
            asked = chat(messages=[{"role": "user", "content": "Hi"}, {"role": role, "content": "Mine"}])
            assert with_defaults(asked, own) == asked

    @pytest.mark.parametrize("name", sorted(Sampling.model_fields))
    @given(value=st.one_of(st.none(), st.integers(-5, 5), st.floats(-5, 5), st.booleans(), st.text(max_size=2),
                           st.lists(st.sampled_from(["top_k", "x", ""]), max_size=2)))  # fmt: skip
    @settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    def test_they_may_be_what_a_request_may_say(self, name: str, value: object) -> None:
        def passes(call) -> bool:
            try:
                call()
            except InvalidRequest:
                return False
            return True

        assert passes(lambda: chat(**{name: value})) == passes(lambda: checked(Parameters, {name: value}))

    @pytest.mark.parametrize("given", [{"stop": [""]}, {"stop": ["a"] * 17}, {"stop": 3}, {"n": 2}, {"messages": []}])
    def test_other_values_and_other_fields_are_refused(self, given: dict) -> None:
        with pytest.raises(InvalidRequest):
            checked(Parameters, given)


documents = st.builds(
    Document,
    name=st.from_regex(r"\A[a-z0-9][a-z0-9._:/-]{0,20}\Z"),
    source=st.just("ollama://x"),
    sha256=st.none() | st.just(A),
    slots=st.integers(1, 9),
    pinned=st.booleans(),
    chat_template=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30),
    system_prompt=st.text(alphabet="a\n'\"#:- {%}é😀", max_size=30),
    selector=st.dictionaries(st.sampled_from(["zone", "a/b"]), st.sampled_from(["yes", "1", "null"])),
    options=st.lists(st.sampled_from(["a:b", "no: yes", "# x"]), max_size=2).map(tuple),
    parameters=st.builds(Parameters, temperature=st.none() | st.floats(0, 2), stop=st.none() | st.just(["</s>", "- "])),
    draft_model=st.none() | st.builds(File, source=st.just("ollama://d"), size=st.integers(0, 99)),
    loras=st.lists(st.builds(Adapter, source=st.just("ollama://l"), scale=st.floats(-1, 1)), max_size=2).map(tuple),
)


@given(documents)
@settings(deadline=None)
def test_a_document_that_was_written_is_read_as_the_same(document: Document) -> None:
    record = document.model_dump(mode="json", exclude_defaults=True)
    for text in (yaml.safe_dump(record, sort_keys=False, allow_unicode=True), json.dumps(record)):
        assert checked(Document, read_yaml(text)[0]) == document
    assert document.config.model_dump() == document.model_dump(exclude={"name"})


def test_what_a_node_is_told_leaves_out_what_is_done_before() -> None:
    told = Model(id="m", name="m", revision=1, config=config(parameters={"top_k": 1}, system_prompt="x")).spec()
    assert {"parameters", "system_prompt"}.isdisjoint(told)
    assert {"parameters", "system_prompt"} < AROUND_REPLICAS


class TestYaml:
    def test_several_documents_are_read_and_empty_ones_left_out(self) -> None:
        assert read_yaml("a: 1\n---\n---\n- b\n") == [{"a": 1}, ["b"]]
        assert read_yaml(b'{"a": [1, "\\u00e9"]}') == [{"a": [1, "é"]}]
        assert read_yaml("") == []
        assert read_yaml("{a: 2020-01-01, b: 2020-99-99}") == [{"a": "2020-01-01", "b": "2020-99-99"}]
        assert read_yaml('{"a": 1e-05, "b": -2E+3, "c": 1.5e3}') == [{"a": 1e-05, "b": -2000.0, "c": 1500.0}]

    def test_aliases_and_merged_keys_are_read(self) -> None:
        assert read_yaml("- &a {x: 1, y: 2}\n- {<<: *a, y: 3}\n") == [[{"x": 1, "y": 2}, {"x": 1, "y": 3}]]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("a: [", "expected"),
            ("a: 1\nb: 2\na: 3\n", "'a' stands there twice"),
            ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
            ("a: &a [*a]", "what it is a part of"),
            ("[" * 101 + "]" * 101, "levels"),
            ("[" * 50_000, "no YAML"),
            ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
             f"more than {MOST_VALUES} values"),
            ("a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
             f"more than {MOST_VALUES} values"),
            ("a: \x00", "no YAML"),
            ('a: "\\0"', "character U\\+0000"),
            ('{"a": "\\ud800"}', "no YAML"),
            ("a: .nan", "is no number"),
            ("a: !!binary AA==", "a tag makes a bytes"),
            ("? !!binary aGk=\n: b", "a tag makes a bytes"),
            ("a: !!set {x}", "a tag makes a set"),
            ("a: [!!timestamp 2020-01-01]", "a tag makes a date"),
            ("a: !!bool perhaps", "no YAML"),
            ("a: 0x" + "f" * 5000, "a number is larger than"),
            (b"\xff\xfe\xff", "no YAML"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_meant_is_refused(self, text: str, says: str) -> None:
        with pytest.raises(InvalidValue, match=says):
            read_yaml(text)

    @pytest.mark.parametrize("field", ["size", "gpu_layers"])
    def test_a_number_that_no_node_could_be_told_is_refused(self, field: str) -> None:
        with pytest.raises(InvalidValue, match=f"'{field}'"):
            checked(Document, {"name": "m", "source": "x", field: 1 << 60})

    def test_an_unknown_field_is_named(self) -> None:
        with pytest.raises(UnknownParameter, match=r"'loras\.0\.weight'"):
            checked(Document, {"name": "m", "source": "x", "loras": [{"source": "y", "weight": 1}]})
