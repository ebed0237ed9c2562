"""What results look like, and where they say they were measured."""

import json
from datetime import datetime

import pytest

from cairn.cli.output import machine, show


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/bin/cairn", "bench", "policy", "a trace.jsonl"])
    head = machine()
    assert head["command"] == "cairn bench policy 'a trace.jsonl'"
    assert head["cores"] >= 1
    assert head["memory_bytes"] > 1 << 28
    assert datetime.fromisoformat(head["date"]).tzinfo is not None
    assert all(head[name] for name in ("cpu", "kernel", "python", "cairn"))


def test_json_is_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"store_gb_per_s": 1.5, "lru": {"1000": 0.25}}
    show(result, title="bench", as_json=True)
    assert json.loads(capsys.readouterr().out) == result


def printed_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_table_has_a_row_for_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show({"gb_per_s": 1.23456, "lru": {"1000": 0.25, "3000": 1}, "owner": None}, title="cairn bench x", as_json=False)
    text = capsys.readouterr().out
    assert text.startswith("cairn bench x")
    assert printed_rows(text) == [["gb_per_s", "1.235"], ["lru.1000", "0.25"], ["lru.3000", "1"], ["owner", "-"]]


def test_a_table_shows_brackets_and_colons_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show({"http": "http://[fe80::1]:80", "[/b]": ":boom:", "[red]": 1}, title="[/x].kv", as_json=False)
    text = capsys.readouterr().out
    assert text.startswith("[/x].kv")
    assert printed_rows(text) == [["http", "http://[fe80::1]:80"], ["[/b]", ":boom:"], ["[red]", "1"]]


def test_the_same_figures_of_several_things_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {"1000": {"hit": {"lru": 1, "belady": 2}}, "3000": {"hit": {"lru": 3, "belady": 4}}}
    show({"requests": 12345, "blocks": blocks}, title="cairn bench x", as_json=False)
    assert printed_rows(capsys.readouterr().out) == [
        ["requests", "12,345"],
        ["hit.lru", "1", "3"],
        ["hit.belady", "2", "4"],
    ]
