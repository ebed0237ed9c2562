"""Objects say nothing of who wrote them: what is written at one degree of parallelism is read at any other."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.kv import CANONICAL, KeyChain, Keys, KVGeometry, Layout, Namespace
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.disk import DiskTier
from cairn.tier.remote import RemoteTier
from cairn.tier.remote.files import FileStore
from tests.tier.layouts import geometries, layouts, parallel, row_of
from tests.tier.remote.rig import LIMITS, ask
from tests.tier.rig import memory, soon

PACK, BLOCKS = 4, 6
EIGHT_HEADS = KVGeometry(layers=4, kv_heads=8, head_dim=4, block_tokens=2)


def keys_of(geometry: KVGeometry) -> Keys:
    tokens = np.arange(BLOCKS * geometry.block_tokens)
    return KeyChain(Namespace(model="test", geometry=geometry).digest(), geometry.block_tokens, tokens).keys


def rows_of(geometry: KVGeometry, layout: Layout) -> Rows:
    rows = memory(BLOCKS)
    for block, row in enumerate(rows):
        row[: geometry.block_bytes] = row_of(geometry, layout, block)
    return Rows(rows, np.arange(BLOCKS, dtype=np.int32))


def tier(home: Path, geometry: KVGeometry, layout: Layout) -> RemoteTier:
    object_bytes = PACK * geometry.block_bytes
    return RemoteTier(FileStore(home), geometry=geometry, limits=LIMITS, layout=layout, object_bytes=object_bytes)


def write(home: Path, geometry: KVGeometry, layout: Layout) -> None:
    writer, keys = tier(home, geometry, layout), keys_of(geometry)
    rows = rows_of(geometry, layout)
    before = rows.memory.copy()
    namespace = Namespace(model="test", geometry=geometry).digest()
    try:
        assert writer.write(keys, 0, rows, namespace=namespace, deadline=soon()).result(60) == [None] * BLOCKS
        assert np.array_equal(rows.memory, before), "a write must leave the rows alone"
    finally:
        writer.close(10)


def check_read(home: Path, geometry: KVGeometry, layout: Layout, first: int = 0) -> None:
    """Everything from block `first` on is there, each value in its place."""
    reader, keys = tier(home, geometry, layout), keys_of(geometry)
    rows = Rows(memory(BLOCKS - first), np.arange(BLOCKS - first, dtype=np.int32))
    try:
        assert ask(reader, keys) == BLOCKS
        assert reader.read(keys, first, rows, deadline=soon()).result(60) == [None] * (BLOCKS - first)
        expected = rows_of(geometry, layout).memory[first:, : geometry.block_bytes]
        assert np.array_equal(rows.memory[:, : geometry.block_bytes], expected)
    finally:
        reader.close(10)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_reads_what_any_other_has_written(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    writes, reads = data.draw(layouts(geometry)), data.draw(layouts(geometry))
    with tempfile.TemporaryDirectory() as home:
        write(Path(home), geometry, writes)
        # From the middle of an object on, too.
        check_read(Path(home), geometry, reads, first=data.draw(st.integers(0, BLOCKS - 1)))


def files(home: Path) -> dict[Path, bytes]:
    return {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_two_ranks_write_and_one_four_and_a_pipeline_read(tmp_path: Path) -> None:
    """And had they written it, the objects would be the same to the byte."""
    write(tmp_path / "two", EIGHT_HEADS, parallel(EIGHT_HEADS, 2, [4], "vllm_cpu"))
    others = {
        "one": CANONICAL,
        "four": parallel(EIGHT_HEADS, 4, [4]),
        "pipeline": parallel(EIGHT_HEADS, 2, [1, 3], "vllm_cpu"),
    }
    for name, layout in others.items():
        check_read(tmp_path / "two", EIGHT_HEADS, layout)
        write(tmp_path / name, EIGHT_HEADS, layout)
        assert files(tmp_path / name) == files(tmp_path / "two")


def test_a_disk_keeps_rows_as_they_stand_and_gives_them_to_no_other_layout(tmp_path: Path) -> None:
    keys, namespace = keys_of(EIGHT_HEADS), Namespace(model="test", geometry=EIGHT_HEADS).digest()
    two = parallel(EIGHT_HEADS, 2, [4])
    for layout, expected in ((two, None), (two, None), (CANONICAL, Reason.FOREIGN)):
        disk = DiskTier(tmp_path, geometry=EIGHT_HEADS, layout=layout, capacity_bytes=1 << 20)
        try:
            rows = rows_of(EIGHT_HEADS, two)
            if disk.match(keys) == 0:
                disk.write(keys, 0, rows, namespace=namespace, deadline=soon()).result(60)
            out = Rows(memory(BLOCKS), rows.ids)
            assert set(disk.read(keys, 0, out, deadline=soon()).result(60)) == {expected}
            assert disk.match(keys) == (0 if expected else BLOCKS)
        finally:
            disk.close(10)
