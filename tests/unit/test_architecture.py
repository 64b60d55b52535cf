"""What the docs say is there is there: files, tests, settings, commands."""

import re
from pathlib import Path

import pytest
import typer.main

from localai_q.cli.main import app
from localai_q.config import Settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("localai_q", "api", "workers", "tests", "docs", "bench", "deploy")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
STEPS = ("api/openai/", "api/sse.py", "localai_q/cluster/routing.py", "localai_q/bus/", "workers/replica/")


def paths(page: Path) -> list[str]:
    """Paths in backticks: those that begin with one of our folders."""
    quoted = re.findall(r"`([^`\n]+)`", page.read_text())
    found = {each.split(":")[0].split("#")[0] for each in quoted if each.startswith(tuple(f"{f}/" for f in FOLDERS))}
    return sorted(found)


def test_the_page_walks_the_road_of_a_request_with_file_names() -> None:
    text = PAGE.read_text()
    assert [step for step in STEPS if step not in text] == []
    assert len(paths(PAGE)) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    missing = [path for path in paths(page) if not (list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())]
    assert missing == []


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_[a-z_]+)`", PAGE.read_text()))
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in tests for name in re.findall(r"def (test_\w+)\(", text)}
    assert len(named) >= 40
    assert sorted(named - there) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert sorted(set(re.findall(r"LOCALAI_[A-Z0-9_]*[A-Z0-9]\b", page.read_text())) - known) == []


def test_every_command_that_is_named_exists() -> None:
    """In the docs, and in what errors tell people to do."""
    known = typer.main.get_group(app).commands
    sources = [path for folder in ("localai_q", "api", "workers") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in [*PAGES, *sources])
    assert sorted(set(re.findall(r"`localai-q ([a-z]+)", text)) - known.keys()) == []
    for group, names in re.findall(rf"localai-q ({'|'.join(known)}) ([a-z][a-z|-]*[a-z])", text):
        there = getattr(known[group], "commands", {})
        assert not there or set(names.split("|")) <= there.keys(), f"localai-q {group} {names}"


@pytest.mark.parametrize("package", ["localai_q", "api", "workers"])
def test_every_module_says_what_it_is_for(package: str) -> None:
    made = ("_pb2.py", "_pb2_grpc.py")
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        if text.strip() and not path.name.endswith(made) and "versions" not in path.parts:
            assert text.lstrip().startswith('"""'), path
