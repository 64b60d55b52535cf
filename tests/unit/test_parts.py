"""Models in several files: how they are called, what a document says of them, what they take, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import gguf, split
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster import parts
from localai_q.cluster.memory import need
from localai_q.cluster.models import Document, ModelConfig
from localai_q.documents import checked
from localai_q.errors import InvalidValue
from localai_q.gguf import read_facts

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
HUB = "huggingface://o/r/q4/big-0000{}-of-00003.gguf@main"
WEB = "https://host/big-0000{}-of-00003.gguf?download=true"


def sources(config: ModelConfig) -> list[str]:
    return [file.source for file in config.own]


class TestNames:
    @pytest.mark.parametrize("name", [
        HUB, WEB, "s3://bucket/a/big-0000{}-of-00003.gguf", "file:/srv/big-0000{}-of-00003.gguf", "big-0000{}-of-00003.GGUF",
        "pypi:a==1#b/big-0000{}-of-00003.gguf", "https://host/?file=big-0000{}-of-00003.gguf",
    ])  # fmt: skip
    def test_the_others_are_named_after_the_first(self, name: str) -> None:
        assert parts.every(name.format(1)) == [name.format(number) for number in (1, 2, 3)]

    @pytest.mark.parametrize("name", ["big.gguf", "big-00001-of-00001.gguf", "big-1-of-3.gguf", "big-00001-of-00003.gguf.x",
                                      "big-00001-of-00003", "big-00001-of-00003/x.gguf", ""])  # fmt: skip
    def test_any_other_name_is_of_one_file(self, name: str) -> None:
        assert (parts.part(name), parts.every(name), parts.whole(name)) == (None, [name], name)

    @pytest.mark.parametrize("number", ["00000", "00002", "00003", "00004"])
    def test_another_than_the_first_is_refused_and_the_first_named(self, number: str) -> None:
        with pytest.raises(InvalidValue, match=r"name the first of them, a/big-00001-of-00003.gguf,"):
            parts.every(f"a/big-{number}-of-00003.gguf")

    def test_too_many_are_refused(self) -> None:
        assert len(parts.every(f"x-00001-of-00{parts.MOST_FILES}.gguf")) == parts.MOST_FILES
        with pytest.raises(InvalidValue, match="one of 257 files of a model, and it can have 256"):
            parts.every("x-00001-of-00257.gguf")

    @given(st.text(alphabet="ab-/. ", max_size=9), st.integers(2, 99), st.data())
    def test_each_says_what_it_is_and_what_the_whole_is_called(
        self, stem: str, count: int, data: st.DataObject
    ) -> None:
        number = data.draw(st.integers(1, count))
        found = parts.part(f"{stem}-{number:05}-of-{count:05}.gguf")
        assert found
        assert (found.number, found.count) == (number, count)
        assert found.beside(number) == f"{stem}-{number:05}-of-{count:05}.gguf"
        assert parts.whole(found.beside(1)) == f"{stem}.gguf"


class TestDocuments:
    def test_a_source_in_several_files_needs_nothing_more(self) -> None:
        config = checked(Document, {"name": "big", "source": HUB.format(1)}).config
        assert sources(config) == [HUB.format(number) for number in (1, 2, 3)]
        assert ModelConfig.model_validate(config.model_dump()) == config

    def test_of_a_part_only_what_nobody_can_know_is_said(self) -> None:
        config = checked(
            ModelConfig, {"source": WEB.format(1), "sha256": A, "parts": [{"sha256": B}, {"sha256": C, "size": 5}]}
        )
        assert sources(config) == [WEB.format(number) for number in (1, 2, 3)]
        assert config.contents == {A, B, C}
        own = checked(ModelConfig, {"source": f"store:{A}", "parts": [{"source": f"store:{B}", "sha256": B}]})
        assert sources(own) == [f"store:{A}", f"store:{B}"]

    @pytest.mark.parametrize("given", [[{}], [{}] * 3, [{"source": "x"}]])
    def test_other_than_all_parts_are_refused(self, given: list) -> None:
        with pytest.raises(InvalidValue, match="needs the 2 files behind the first"):
            checked(ModelConfig, {"source": WEB.format(1), "parts": given})

    @pytest.mark.parametrize("given", ["x", 5, [5], [{"sha256": "x"}], {"a": 1}])
    def test_what_is_no_list_of_files_is_refused(self, given: object) -> None:
        with pytest.raises(InvalidValue, match="parts"):
            checked(ModelConfig, {"source": WEB.format(1).replace("00003", "00002"), "parts": given})

    def test_parts_go_with_a_first_file_which_they_are_not(self) -> None:
        with pytest.raises(ValueError, match="give 'source'"):
            ModelConfig(backend="echo", parts=({"source": "x"},))
        assert sources(ModelConfig(source=HUB.format(2))) == [HUB.format(2)], "a row that was written is read"

    def test_mirrors_are_of_all_files(self) -> None:
        config = ModelConfig(source=WEB.format(1), mirrors=("http://b/c-00001-of-00003.gguf",), mmproj={"source": "x"})
        assert [config.mirrors_of(number) for number in range(4)] == [
            *((f"http://b/c-0000{number}-of-00003.gguf",) for number in (1, 2, 3)), (),
        ]  # fmt: skip

    def test_what_is_known_of_them_stays_known(self) -> None:
        config = ModelConfig(source=HUB.format(1), loras=({"source": "l"},))
        known = config.knowing([{"sha256": digest, "size": 7} for digest in (A, B, C, "d" * 64)])
        assert [(file.sha256, file.size) for file in known.own] == [(A, 7), (B, 7), (C, 7)]
        assert known.loras[0].sha256 == "d" * 64
        assert config.like(known) == known
        assert known.makes_same_replica(config.like(known))
        assert not known.makes_same_replica(config)


class TestWhatTheyTake:
    CONFIG = ModelConfig(
        source=HUB.format(1), sha256=A, size=100, parts=({"sha256": B, "size": 200}, {"sha256": C, "size": 300})
    )

    def test_memory_is_guessed_of_all_of_them_or_not_at_all(self) -> None:
        one = need(ModelConfig(source="x", size=600), None, 0)
        assert need(self.CONFIG, None, 0) == one
        assert (
            need(
                self.CONFIG.model_copy(
                    update={"parts": (self.CONFIG.parts[0], self.CONFIG.parts[1].model_copy(update={"size": 0}))}
                ),
                None,
                0,
            )
            is None
        )


class TestHeaders:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        return [tmp_path / f"{number}.gguf" for number in (1, 2, 3)]

    @pytest.mark.parametrize("bare", [False, True])
    def test_all_headers_together_say_what_the_whole_one_does(self, paths: list[Path], bare: bool) -> None:
        paths[0].write_bytes(gguf())
        whole = read_facts(paths[0])
        for path, content in zip(paths, split(gguf(), 3, bare=bare), strict=True):
            path.write_bytes(content)
        together = read_facts(*paths)
        assert replace(together, file_size=whole.file_size) == whole
        assert together.file_size == sum(path.stat().st_size for path in paths)

    @pytest.mark.parametrize(("of", "says"), [
        ([0, 1], "file 1 is one of 3, and there are 2"),
        ([0, 2, 1], "file 2 of 3 says that it is file 3"),
        ([1], "this one is one of 3, and the others are missing; .* …-00001-of-00003.gguf"),
        ([0, 1, "whole"], "file 3 is one of 1, and there are 3"),
        ([0, 1, "of another"], "have 3 tensors together, and one of them is of a model that has another number"),
        ([0, 1, "with another's"], "two of them have the same tensor"),
        ([0, 1, "cut"], "File 3 of 3: .* ends before its tensors do"),
        ([0, 1, "no model"], "File 3 of 3: .* does not begin with 'GGUF'"),
    ])  # fmt: skip
    def test_files_that_do_not_belong_together_are_refused(self, paths: list[Path], of: list, says: str) -> None:
        made = dict(enumerate(split(gguf(), 3)))
        tensors = {"blk.0.attn_q.weight": 320, "x": 32, "y": 32, "blk.1.attn_q.weight": 64}
        made |= {"whole": gguf(), "cut": made[2][:-40], "no model": b"x" * 99,
                 "of another": split(gguf(tensors={"x": 32, "y": 32, "z": 32}), 3)[2],
                 "with another's": split(gguf(tensors=dict(reversed(tensors.items()))), 3)[2]}  # fmt: skip
        for path, each in zip(paths, of, strict=False):
            path.write_bytes(made[each])
        with pytest.raises(InvalidValue, match=says):
            read_facts(*paths[: len(of)])

    def test_a_first_file_alone_that_has_no_tensors_is_refused(self, paths: list[Path]) -> None:
        for path in paths:
            path.write_bytes(split(gguf(tensors={}), 3)[paths.index(path)])
        with pytest.raises(InvalidValue, match="no tensors"):
            read_facts(*paths)
