"""The disk bench measures what it says, small enough to run in a test."""

from pathlib import Path

import pytest

from cairn.cli import bench_disk
from cairn.errors import StorageError


def test_reports_shares_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_disk, "BYTES", 32 << 20)
    result = bench_disk.run_disk(tmp_path, threads=2, rounds=2)
    for size in ("block_2mib", "block_384kib"):
        for kind in ("read", "write"):
            assert result[size][f"{kind}_share_of_raw"] > 0
            assert result[size][f"{kind}_gb_per_s"] > 0
            assert result[size][f"raw_{kind}_gb_per_s"] > 0
    assert result["read_share_of_raw"] == result["block_2mib"]["read_share_of_raw"]
    assert (result["threads"], result["rounds"]) == (2, 2)
    assert list(tmp_path.iterdir()) == []


def test_says_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_disk, "BYTES", 1 << 50)
    with pytest.raises(StorageError, match="needs"):
        bench_disk.run_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []
