"""`cairn bench`: results that say where they were measured, and one line for a trace that cannot be used."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three requests of two blocks, the last one like the first."""
    path = tmp_path / "trace.jsonl"
    ids = ([0, 1], [2, 3], [0, 1])
    path.write_text("".join(json.dumps({"timestamp": 1000 * i, "hash_ids": row}) + "\n" for i, row in enumerate(ids)))
    return path


def test_policy_says_what_where_and_how(run: Run, trace: Path) -> None:
    result = json.loads(run("bench", "policy", trace, "--json").stdout)
    assert (result["requests"], result["block_uses"], result["distinct_blocks"]) == (3, 6, 4)
    assert {round(rate) for rate in result["capacity_blocks"]["1000"]["hit_percent"].values()} == {33}
    assert result["machine"]["command"] == f"cairn bench policy {trace} --json"


def test_policy_for_people_ends_with_the_machine(run: Run, trace: Path) -> None:
    lines = run("bench", "policy", trace).stdout.splitlines()
    assert any("hit_percent.belady" in line for line in lines)
    assert lines[-1].startswith("on ")


@pytest.mark.parametrize("line", ["", "{", "[]", '{"timestamp": 1, "hash_ids": [-1]}', '{"timestamp": 1}', "\0"])
def test_a_trace_that_is_none(run: Run, tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    ended = run("bench", "policy", path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"cairn: {path}")
    assert ended.stderr.count("\n") == 1


def test_paths_that_are_not_there(run: Run, tmp_path: Path) -> None:
    assert run("bench", "policy", tmp_path / "nothing").returncode == 2
    assert run("bench", "policy", tmp_path).returncode == 2
    assert run("bench", "disk", "--dir", tmp_path / "nothing").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("disk", "--dir", "/proc"), 1, "--dir /proc: No such file or directory; name one that can be written"),
        (("remote", "file:///proc/x"), 1, "/proc/x: No such file or directory; name a directory that can be written"),
        (("machine", "--model", "{}"), 2, "{}: no model in Hugging Face format"),
        (("autopilot", "--model", "{}"), 2, "{}: no model in Hugging Face format"),
        (("fleet-sim", "{}/trace.jsonl", "--rate", "inf"), 2, "Invalid value for '--rate'"),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else "",
)
def test_what_cannot_be_measured_is_one_line(
    run: Run, trace: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    ended = run("bench", *(one.format(trace.parent) for one in arguments))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(f"cairn: {says.format(trace.parent)}")
    assert ended.stderr.count("\n") == 1


def test_fleet_sim_compares_every_scheduler_with_and_without_the_shared_tier(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"input_length": 1000, "output_length": 5}
    path.write_text("".join(json.dumps(row | {"timestamp": 9 * i, "hash_ids": [0, i + 1]}) + "\n" for i in range(20)))
    result = json.loads(run("bench", "fleet-sim", path, "--instances", "2", "--rate", "2", "--json").stdout)
    for fleet in ("shared_tier", "no_shared_tier"):
        figures = result[fleet]["by_rate"]["2"]
        assert set(figures) == set(result[fleet]["peak_goodput"]) >= {"round_robin", "slo_aware"}
        assert all(row["goodput"] == 2.0 for row in figures.values())
        assert result[fleet]["meets_bars"] == {"round_robin": False, "least_loaded": False, "prefix_aware": False}


def test_fleet_sim_needs_lengths(run: Run, trace: Path) -> None:
    ended = run("bench", "fleet-sim", trace)
    assert ended.returncode == 2
    assert "input_length" in ended.stderr


def test_serve_measures_the_gateway_beside_an_engine(run: Run) -> None:
    """Real processes; figures that add up, whatever they are."""
    result = json.loads(run("bench", "serve", "--requests", 400, "--engines", 2, "--json").stdout)
    assert result["load"]["prompt_bytes"] == 4096
    for kind in ("whole answers", "streams"):
        direct, cairn = result[kind]["direct"], result[kind]["cairn"]
        assert direct["added_p50_ms"] == 0
        assert cairn["added_p50_ms"] == pytest.approx(cairn["p50_ms"] - direct["p50_ms"])
        assert cairn["added_p50_ms"] > 0
        assert cairn["requests_per_s"] > 0
        assert cairn["cpu_us_per_request"] > 0
