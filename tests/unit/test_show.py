"""Tables for people: what is pasted into the next command is whole, whatever the width of the terminal."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cli import chat, models
from localai_q.cli.show import prose, rows

BAD = "\N{REPLACEMENT CHARACTER}"
ID = "abcdefghijklmnop"


def test_ids_and_names_are_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    job = {"id": ID, "kind": "chat", "name": "n" * 30, "state": "failed", "error": "a long story " * 20}
    rows([job], list(job), as_json=False, empty="")
    out = capsys.readouterr().out
    assert ID in out
    assert "n" * 30 in out
    assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", out).splitlines())) <= 80


def test_a_table_that_is_no_terminals_has_a_line_for_each_record(capsys: pytest.CaptureFixture[str]) -> None:
    rows([{"id": ID, "error": "word " * 30}], ["id", "error"], as_json=False, empty="")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_name_that_is_longer_than_the_terminal_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rows([{"id": ID, "name": "n" * 128, "role": "admin"}], ["id", "name", "role"], as_json=False, empty="")
    assert re.search(f"{ID} +{'n' * 128} +admin", capsys.readouterr().out)


def test_what_comes_from_elsewhere_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows(
        [{"id": ID, "error": "no \x1b]0;mine\x07\x1b[2J [/x] [red]file[/red]"}],
        ["id", "error"],
        as_json=False,
        empty="",
    )
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[/x] [red]file[/red]" in out


def plain(text: str) -> str:
    """What of a text is no control, no half of a character, and stands for none."""
    return "".join(each for each in text if unicodedata.category(each) not in ("Cc", "Cs") and each != BAD)


@given(st.text(st.characters(exclude_categories=())))
def test_of_a_text_a_terminal_obeys_line_ends_and_tabs_only(said: str) -> None:
    told = prose(said)
    assert {each for each in told if unicodedata.category(each) in ("Cc", "Cs")} <= {"\n", "\t"}
    assert plain(told) == plain(said)


def test_a_model_that_speaks_to_the_terminal_is_read_and_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [
        "one\x1b",
        "[2Jtwo\x9b1m\r\n\tthree\x08",
        "\ud800 \N{MAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} \u05d0\u200f",
    ]
    monkeypatch.setattr(chat, "answer", lambda *_: iter(pieces))
    assert chat._say(None, "m", [], 9) == "".join(pieces), "it is sent back as it was said"
    shown = "\N{MAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} \u05d0\u200f"
    assert capsys.readouterr().out == f"one{BAD}[2Jtwo{BAD}1m\n\tthree{BAD}{BAD} {shown}\n"


def test_what_an_import_warns_of_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    models._say_added({"name": "m", "warnings": ["options: \x1b[2J is left out"]})
    assert capsys.readouterr().out.endswith("\n  options:  [2J is left out\n")
