"""Tables for people: what is pasted into the next command is whole, whatever the width of the terminal."""

import re

import pytest

from localai_q.cli.show import rows

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
