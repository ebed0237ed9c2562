"""Names of metrics and reasons in the documentation are those that there are."""

import re

from cairn.config.autopilot import PRESETS
from cairn.observe.reasons import Reason
from cairn.plan import Kind, Why
from tests.docs.pages import PAGES, ROOT

_NAME = re.compile(r"\bcairn_[a-z_]+[a-z]\b(?!/)")
#: Names that begin alike and are no metrics.
_OTHERS = {"cairn_kv", "cairn_yaml"}


def test_metrics_have_the_names_that_the_pages_give_them() -> None:
    """Those of metrics.md, which is held against the registries and what processes export (tests/observe)."""
    known = {*_NAME.findall((ROOT / "docs" / "metrics.md").read_text())} | _OTHERS
    missing = {}
    for page in PAGES:
        for name in _NAME.findall(page.read_text()):
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            if not {name, plain, f"{name}_total"} & known:
                missing[name] = page.name
    assert missing == {}


def test_every_reason_is_told() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    assert [reason for reason in Reason if f"| `{reason}` |" not in page] == []
    told = re.findall(r"^\| `(\w+)` \|", page.split("## Reasons")[1], re.MULTILINE)
    assert {*told} == {*map(str, Reason)}


def test_every_claim_about_others_has_a_source_with_a_date() -> None:
    parts = re.split(r"^## ", (ROOT / "docs" / "comparison.md").read_text(), flags=re.MULTILINE)
    tables = {part.splitlines()[0]: rows_of(part) for part in parts}
    sources = {name: date for name, _, date in tables["Sources"]}
    assert [date for date in sources.values() if not re.search(r"20\d\d-\d\d", date)] == []
    better = [row[2] for row in tables["Where the others are better"]]
    figures = [row[3] for row in tables["Figures measured side by side"]]
    cells = [cell for row in tables["Side by side"] for cell in row[2:] if cell]
    assert min(map(len, (better, figures, cells))) > 5
    ours = {row[0]: row[1] for row in tables["Side by side"]}
    assert [claim for claim, cell in ours.items() if not re.search(r"\]\([a-z-]+\.md", cell)] == []
    for claim in (*better, *figures, *cells):
        named = re.findall(r"\[(\w\d?)\]", claim)
        assert named, claim
        assert {*named} <= {*sources}, claim


def test_the_autopilots_page_has_every_preset_decision_and_reason() -> None:
    parts = re.split(r"^## ", (ROOT / "docs" / "autopilot.md").read_text(), flags=re.MULTILINE)
    tables = {part.splitlines()[0]: rows_of(part) for part in parts}

    def named(table: str) -> set[str]:
        return {name for row in tables[table] for name in re.findall(r"`([\w-]+)`", row[0])}

    head = re.search(r"^\| preset \| (.+) \|$", parts[1], re.MULTILINE)
    assert head
    shown = {re.findall(r"`([\w-]+)`", row[0])[0]: row[1:] for row in tables["The scenario table"]}
    columns = head[1].split(" | ")
    assert {name: dict(zip(columns, row, strict=True)) for name, row in shown.items()} == {
        name: pins for name, pins in PRESETS.items() if name != "auto"
    }
    assert named("Decisions") == {*map(str, Kind)}
    assert named("Reasons") == {*map(str, Why)}


def rows_of(text: str) -> list[list[str]]:
    """The cells of a part's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
