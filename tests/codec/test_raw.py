"""The identity codec."""

import numpy as np

from cairn.codec import Raw
from cairn.kv import KVGeometry

GEOMETRY = KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)


def test_moves_no_bytes() -> None:
    block = np.arange(GEOMETRY.block_bytes, dtype=np.uint8)
    codec = Raw(GEOMETRY)
    stored = codec.encode(block)
    assert stored.ctypes.data == block.ctypes.data
    assert codec.decode(stored, block)
    assert codec.stored_bytes_limit() == GEOMETRY.block_bytes


def test_decodes_into_other_memory_and_refuses_other_lengths() -> None:
    block = np.arange(GEOMETRY.block_bytes, dtype=np.uint8)
    out = np.zeros_like(block)
    codec = Raw(GEOMETRY)
    assert codec.decode(block, out)
    assert np.array_equal(out, block)
    assert not codec.decode(block[:-1], out)
