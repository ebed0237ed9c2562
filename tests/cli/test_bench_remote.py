"""The remote bench measures what it says, small enough to run in a test, and leaves the store empty."""

from pathlib import Path

import pytest

from cairn.cli.bench_remote import run_remote
from cairn.errors import InputError


def test_reports_shares_and_leaves_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    result = run_remote([url], sizes_mib=(1,), rounds=2, round_bytes=2 << 20, prefix_objects=20)[url]
    for kind in ("load", "store"):
        assert result["1_mib"][f"{kind}_share_of_bare"] > 0
        assert result["1_mib"][f"{kind}_mib_per_s"] > 0
        assert result["1_mib"][f"bare_{kind}_mib_per_s"] > 0
    assert result["lookup"]["objects"] == 20
    assert result["lookup"]["round_trips"] in (1, 2)
    assert [path for path in (tmp_path / "shared").rglob("*") if path.is_file() and "sweep" not in path.name] == []


def test_a_store_without_a_bare_client_is_refused() -> None:
    with pytest.raises(InputError, match="no bare client"):
        run_remote(["ours://shelf"])
