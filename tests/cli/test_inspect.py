"""`cairn inspect` on a directory that a disk tier has written."""

import json
import mmap
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cairn.kv import KeyChain, KVGeometry, Namespace
from cairn.tier.base import Rows
from cairn.tier.disk import DiskTier

Run = Callable[..., subprocess.CompletedProcess[str]]
BLOCKS = 6


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A closed cache directory with one chain of BLOCKS blocks of 8 KiB."""
    geometry = KVGeometry(layers=2, kv_heads=2, head_dim=32)
    namespace = Namespace(model="m", geometry=geometry).digest()
    memory = np.frombuffer(mmap.mmap(-1, BLOCKS * geometry.block_bytes), np.uint8).reshape(BLOCKS, -1)
    memory[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None] + 1
    tier = DiskTier(tmp_path / "cache", geometry=geometry, capacity_bytes=1 << 20)
    keys = KeyChain(namespace, geometry.block_tokens, range(BLOCKS * geometry.block_tokens)).keys
    rows = Rows(memory, np.arange(BLOCKS, dtype=np.int32))
    outcomes = tier.write(keys, 0, rows, namespace=namespace, deadline=time.monotonic() + 30).result(60)
    tier.close(30)
    assert outcomes == [None] * BLOCKS
    return tmp_path / "cache"


def test_a_sound_directory(run: Run, directory: Path) -> None:
    found = json.loads(run("inspect", directory, "--verify", "--json").stdout)
    assert found["blocks"] == BLOCKS
    assert found["frames"] == {"sound": BLOCKS, "damaged": 0, "changed": 0}
    assert [namespace["blocks"] for namespace in found["namespaces"]] == [BLOCKS]


def test_a_damaged_frame_is_counted_when_frames_are_read(run: Run, directory: Path) -> None:
    data = bytearray((directory / "data").read_bytes())
    data[data.index(bytes([3]) * 4096)] ^= 1
    (directory / "data").write_bytes(data)
    assert json.loads(run("inspect", directory, "--json").stdout)["frames"] is None
    ended = run("inspect", directory, "--verify", "--json")
    assert json.loads(ended.stdout)["frames"] == {"sound": BLOCKS - 1, "damaged": 1, "changed": 0}


def test_the_table_shows_the_same(run: Run, directory: Path) -> None:
    rows = [line.split("│")[1:3] for line in run("inspect", directory).stdout.splitlines() if line.startswith("│")]
    figures = {name.strip(): value.strip() for name, value in rows}
    assert figures["blocks"] == str(BLOCKS)
    assert figures["geometry.layers"] == "2"
    assert figures["frames"] == "-"


def test_what_is_no_cache_directory(run: Run, tmp_path: Path) -> None:
    ended = run("inspect", tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"cairn: {tmp_path}: not a cache directory")
    assert ended.stderr.count("\n") == 1
    assert run("inspect", tmp_path / "nothing").returncode == 2
