"""The kernels against the package xxhash, the oracle."""

import itertools

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cairn.codec.xxh3 import ALIGNMENT, SHORT, UNIT, absorb, begin, carry, finish, units


def summed(data: np.ndarray, cuts: list[int]) -> bytes:
    """The checksum of data that is absorbed piece by piece, cut at multiples of `UNIT`."""
    state, digest = np.empty(8, np.uint64), np.zeros(16, np.uint8)
    carried, copied, copy = np.empty(8, np.uint64), np.zeros(16, np.uint8), np.zeros(len(data) + ALIGNMENT, np.uint8)
    target = -(-copy.ctypes.data // ALIGNMENT) * ALIGNMENT
    begin(state)
    begin(carried)
    edges = sorted({0, units(len(data)), *(cut * UNIT for cut in cuts if cut * UNIT < units(len(data)))})
    for start, stop in itertools.pairwise(edges):
        absorb(state, data.ctypes.data + start, stop - start)
        carry(carried, data.ctypes.data + start, target + start, stop - start)
    finish(state, data.ctypes.data, len(data), digest)
    finish(carried, data.ctypes.data, len(data), copied)
    assert copied.tobytes() == digest.tobytes()
    shift = target - copy.ctypes.data
    assert np.array_equal(copy[shift : shift + edges[-1]], data[: edges[-1]])
    assert not copy[shift + edges[-1] :].any()
    return digest.tobytes()


@pytest.mark.parametrize("around", [SHORT + 1, 256, UNIT, 2 * UNIT, 16 * UNIT, 64 * UNIT])
def test_every_size_around_an_edge_equals_xxhash(around: int) -> None:
    data = np.random.default_rng(around).integers(0, 256, around + 200, np.uint8)
    for size in range(max(SHORT + 1, around - 130), around + 130):
        assert summed(data[:size], []) == xxhash.xxh3_128_digest(data[:size].data), size


@given(st.integers(SHORT + 1, 70_000), st.lists(st.integers(0, 70)), st.integers(0, 7), st.integers(0, 1 << 30))
def test_any_pieces_at_any_address_equal_xxhash(size: int, cuts: list[int], shift: int, noise: int) -> None:
    data = np.random.default_rng(noise).integers(0, 256, size + shift, np.uint8)[shift:]
    assert summed(data, cuts) == xxhash.xxh3_128_digest(data.data)
