"""What docs/architecture.md says is in the repository is in the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("localai_q", "api", "workers", "tests", "docs", "bench", "deploy")
STEPS = ("api/openai/", "api/sse.py", "localai_q/cluster/routing.py", "localai_q/bus/", "workers/replica/")


def paths() -> list[str]:
    """Paths in backticks: those that begin with one of our folders."""
    quoted = re.findall(r"`([^`\n]+)`", PAGE.read_text())
    found = {each.split(":")[0].split("#")[0] for each in quoted if each.startswith(tuple(f"{f}/" for f in FOLDERS))}
    return sorted(found)


def test_the_page_walks_the_road_of_a_request_with_file_names() -> None:
    text = PAGE.read_text()
    assert [step for step in STEPS if step not in text] == []
    assert len(paths()) >= 8


def test_every_path_that_the_page_names_exists() -> None:
    missing = [path for path in paths() if not (list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())]
    assert missing == []


@pytest.mark.parametrize("package", ["localai_q", "api", "workers"])
def test_every_module_says_what_it_is_for(package: str) -> None:
    made = ("_pb2.py", "_pb2_grpc.py")
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        if text.strip() and not path.name.endswith(made) and "versions" not in path.parts:
            assert text.lstrip().startswith('"""'), path
