"""What the documentation shows runs, and what it links to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_embedding_example_runs_and_is_warm_the_second_time(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, str(ROOT / "examples" / "embed_engine.py")]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout

    assert "loaded 0 of 1000 tokens" in run()
    second = run()
    assert "loaded 992 of 1000 tokens" in second
    assert "hits by tier: {'disk': 992}" in second


def test_the_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    help_text = subprocess.run(
        [sys.executable, "-c", "from cairn.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = set(re.findall(r"^cairn (\w+)", readme, re.MULTILINE))
    assert named
    assert all(f"  {name}" in help_text for name in named)
