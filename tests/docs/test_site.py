"""The site builds without a warning and asks nobody for anything; every link of every page leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pymdownx.slugs import slugify

from tests.docs.pages import PAGES, ROOT, prose

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
#: What a browser fetches by itself.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?=[^>]+(?:stylesheet|preconnect)))"
    r"[^>]+(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with warnings as errors: pages that are not in the navigation, links and anchors that lead nowhere."""
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(where)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=240)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    return where


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert {path.name for path in pages} >= {"index.html", "quickstart.html", "configuration.html", "CHANGELOG.html"}
    for path in pages:
        assert _FETCHED.findall(path.read_text()) == [], path
    for path in (ROOT / "docs").rglob("*.svg"):
        drawn = re.sub(
            r"xmlns(:\w+)?=\"[^\"]+\"|<metadata>.*?</metadata>|<!DOCTYPE.*?>", "", path.read_text(), flags=re.DOTALL
        )
        assert not re.search(r"(href|src)=\"?https?:|url\(\"?https?:|@import", drawn), path


def test_every_picture_is_in_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".svg", ".png")]
    assert len(pictures) >= 6
    assert [path.name for path in pictures if path.name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """In the repository as it is; links to elsewhere are looked at for their form alone, as nothing is fetched here."""
    wrong = []
    for link in _LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            if not re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/\S*)?", link):
                wrong.append(link)
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as mkdocs.yml and GitHub make them."""
    make = slugify(case="lower")
    return {make(re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading), "-") for heading in _HEADING.findall(prose(page))}
