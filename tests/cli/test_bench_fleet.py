"""The fleet bench measures what it says, small enough to run in a test."""

import pytest

from cairn.cli import bench_fleet, bench_fleet_http, bench_fleet_snapshot


@pytest.mark.parametrize("part", ["wire", "shared", "distinct", "ragged", "growth", "busy"])
def test_every_part_has_figures(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fleet, "QUERY_BLOCKS", 256)
    arguments = {
        "wire": (3, 64, 1, 8),
        "shared": (3, 64, 16),
        "distinct": (2, 64),
        "ragged": (3,),
        "growth": (0,),
        "busy": (2,),
    }[part]
    found = bench_fleet.PARTS[part](*arguments)
    assert 0 < found["query_us_p50"] <= found["query_us_p99"]
    if part == "ragged":
        assert found["sets"] == 3
    else:
        assert found["ingest_blocks_per_s"] > 0
    if part == "growth":
        assert found["worker_blocks"] == 2 * 64 * 256


def test_the_service_has_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checks the answers on its way, too."""
    monkeypatch.setattr(bench_fleet, "QUERY_BLOCKS", 512)
    monkeypatch.setattr(bench_fleet_http, "_TIMES", 10)
    found = bench_fleet_http.run_http(2)
    names = ("in_process", "http_binary", "http_json", "http_binary_busy")
    assert set(found) == {f"{name}_us_p{q}" for name in names for q in (50, 99)}
    assert found["http_binary_us_p50"] > found["in_process_us_p50"] > 0


def test_all_parts_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(bench_fleet, "_apart", lambda *arguments: {str(asked.append(arguments)): 1.0})
    result = bench_fleet.run_fleet((1,), ((2, 3),))
    assert set(result) == {*bench_fleet.PARTS}
    assert ("wire", 2, 3, 1, 64) in asked
    assert ("shared", 2, 3, 64) in asked
    assert ("growth", 1) in asked


def test_snapshots_have_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fleet_snapshot, "QUERY_BLOCKS", 256)
    monkeypatch.setattr(bench_fleet_snapshot, "SECONDS", 0.1)
    found = bench_fleet_snapshot.run_snapshot(0)
    assert found["worker_blocks"] == 2 * 64 * 256
    assert found["bytes"] > 25 * found["worker_blocks"]
    assert all(figure > 0 for figure in found.values())
