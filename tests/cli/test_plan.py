"""`cairn plan`: what it says, draws, and how it refuses."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

SLICE = Path(__file__).parents[1] / "data" / "conversation_2000.jsonl"


def test_a_plan_in_every_form(run: Run, tmp_path: Path) -> None:
    """One tier of two, and a price that makes the smaller one the cheapest that will do."""
    picture = tmp_path / "plan.svg"
    options = ["--requests", 300, "--instances", 2, "--remote", 0, "--remote", "100GB", "--remote", "4TB"]
    options += ["--price", "gpu=2", "--price", "remote=0.73", "--percent", 5, "--processes", 1]
    result = json.loads(run("plan", SLICE, *options, "--plot", picture, "--json").stdout)
    assert [row["remote_bytes"] for row in result["fleets"]] == [0, 10**11, 4 * 10**12]
    assert [row["cost_per_hour"] for row in result["fleets"]] == [4.0, 4.1, 8.0]
    hits = [row["of_possible_percent"] for row in result["fleets"]]
    assert hits == sorted(hits)
    assert hits[0] < hits[2]
    assert result["cheapest"] == result["fleets"][0]
    assert result["simulated_requests"] == 900
    assert [one["tier"] for one in result["needed_for_90_percent"]] == ["remote"]
    assert "<svg" in picture.read_text()

    shown = run("plan", SLICE, *options, "--codec", "none", "--codec", "cachegen-high").stdout
    assert "remote alone, cachegen-high: 90 % of the possible hits" in shown
    assert "cheapest fleet" in shown
    assert "4 TB" in shown
    assert "…" not in shown


def test_a_trace_is_repeated_and_every_combination_tried(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "[log].jsonl"  # no markup
    rows = [{"timestamp": i, "prompt": [i % 3] * 100, "output_tokens": 3} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dram", 0, "--dram", "1GB", "--disk", 0, "--disk", "1GB", "--every", "--block-tokens", 16]
    result = json.loads(run("plan", path, *options, "--instances", 1, "--requests", 50, "--json").stdout)
    assert len(result["fleets"]) == 4
    assert (result["requests"], result["simulated_requests"]) == (50, 200)
    assert result["possible_hit_percent"] == pytest.approx(100 * 17 * 96 / 2000)
    shown = run("plan", path, "--block-tokens", 16, "--instances", 1, "--requests", 50).stdout
    assert "[log].jsonl: 50 requests" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dram", "many"], "--dram many"),
        (["--policy", "mru"], "tenure"),
        (["--codec", "zip"], "cachegen-high"),
        (["--price", "gold=1"], "gpu"),
        (["--price", "gpu=x"], "NAME=NUMBER"),
        (["--machine", "nothing.json"], "h200-llama-8b"),
        (["--instances", "1", "--dram", "0", "--plot", "x.svg"], "two sizes"),
    ],
)
def test_what_cannot_be_planned(run: Run, options: list[str], says: str) -> None:
    ended = run("plan", SLICE, "--requests", 40, "--processes", 1, *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert says in ended.stderr
