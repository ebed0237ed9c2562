"""The kernels against hashlib, the oracle."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.kv.blake2s import LANES, hash_chain, hash_rows, initial_state

PERSON = b"cairn/xx"


@pytest.mark.parametrize("rows", [1, LANES - 1, LANES, LANES + 1, 3 * LANES + 5])
@pytest.mark.parametrize("words", [1, 2, 15, 16, 17, 31, 32, 33, 64, 128])
def test_rows_equal_hashlib(rows: int, words: int) -> None:
    data = np.random.default_rng(rows * words).integers(0, 1 << 32, (rows, words), dtype=np.uint32)
    digests = np.empty((rows, 8), np.uint32)
    hash_rows(initial_state(32, PERSON), data, digests)
    expected = [hashlib.blake2s(row.tobytes(), digest_size=32, person=PERSON).digest() for row in data]
    assert [digest.tobytes() for digest in digests] == expected


@given(st.binary(min_size=16, max_size=16), st.integers(1, 12), st.integers(0, 9), st.integers(0, 1 << 30))
def test_chain_equals_hashlib(seed: bytes, words: int, length: int, noise: int) -> None:
    links = np.random.default_rng(noise).integers(0, 1 << 32, (length, words), dtype=np.uint32)
    keys = np.empty((length, 4), np.uint32)
    hash_chain(initial_state(16, PERSON), np.frombuffer(seed, np.uint32), links, keys)
    expected, key = [], seed
    for link in links:
        key = hashlib.blake2s(key + link.tobytes(), digest_size=16, person=PERSON).digest()
        expected.append(key)
    assert [key.tobytes() for key in keys] == expected
