import hashlib
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cairn.errors import InputError
from cairn.kv import KeyChain, KVGeometry, Namespace, as_tokens
from cairn.kv.keys import chunk_root

ROOT = bytes(range(16))
tokens_lists = st.lists(st.integers(0, (1 << 32) - 1), max_size=80)


def plain_keys(root: bytes, block: int, tokens: list[int], extra: dict[int, bytes]) -> list[bytes]:
    """The definition in the docstring of cairn.kv.keys, with nothing but hashlib."""
    keys, key = [], root
    for i in range(len(tokens) // block):
        of_block = np.array(tokens[i * block : (i + 1) * block], "<u4").tobytes()
        link = hashlib.blake2s(of_block, person=b"cairn/lf").digest()
        if i in extra:
            link += hashlib.blake2s(extra[i], digest_size=16, person=b"cairn/ex").digest()
        key = hashlib.blake2s(key + link, digest_size=16, person=b"cairn/bk").digest()
        keys.append(key)
    return keys


def as_bytes(chain: KeyChain) -> list[bytes]:
    return [key.tobytes() for key in chain.keys]


@given(tokens_lists, st.integers(1, 20), st.dictionaries(st.integers(0, 12), st.binary(max_size=9), max_size=4))
def test_chain_equals_its_definition(tokens: list[int], block: int, extra: dict[int, bytes]) -> None:
    chain = KeyChain(ROOT, block, tokens, extra)
    assert as_bytes(chain) == plain_keys(ROOT, block, tokens, extra)
    assert chain.tokens == len(tokens)


@given(tokens_lists, st.integers(1, 9), st.lists(st.integers(0, 80), max_size=6))
def test_extending_in_pieces_changes_nothing(tokens: list[int], block: int, cuts: list[int]) -> None:
    extra = {1: b"image", 3: b"other"}
    chain = KeyChain(ROOT, block, (), extra)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, stop in pairwise(edges):
        chain.extend(tokens[start:stop])
    assert as_bytes(chain) == as_bytes(KeyChain(ROOT, block, tokens, extra))


@given(tokens_lists.filter(lambda tokens: len(tokens) >= 4), st.data())
def test_one_other_token_changes_this_key_and_all_after_it(tokens: list[int], data: st.DataObject) -> None:
    block = 2
    at = data.draw(st.integers(0, len(tokens) // block * block - 1))
    other = list(tokens)
    other[at] ^= 1
    before, after = as_bytes(KeyChain(ROOT, block, tokens)), as_bytes(KeyChain(ROOT, block, other))
    assert before[: at // block] == after[: at // block]
    assert not set(before[at // block :]) & set(after[at // block :])


def test_keys_do_not_depend_on_the_process() -> None:
    code = (
        "from cairn.kv import *; g = KVGeometry(layers=1, kv_heads=1, head_dim=8);"
        "ns = Namespace(model='m', geometry=g, salt=b's', lora='a');"
        "print(KeyChain(ns.digest(), 16, range(64)).keys.tobytes().hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    geometry = KVGeometry(layers=1, kv_heads=1, head_dim=8)
    here = KeyChain(Namespace(model="m", geometry=geometry, salt=b"s", lora="a").digest(), 16, range(64))
    assert outputs == {here.keys.tobytes().hex() + "\n"}


def test_key_of_a_known_prompt_stays_what_it_is() -> None:
    """Stored objects are found by these bytes: whoever changes them must raise LAYOUT_VERSION."""
    geometry = KVGeometry(layers=30, kv_heads=3, head_dim=64, dtype="float32")
    namespace = Namespace(model="HuggingFaceTB/SmolLM2-135M-Instruct", revision="r1", geometry=geometry)
    chain = KeyChain(namespace.digest(), 16, range(32))
    assert (namespace.digest().hex(), chain.key(1).hex()) == (
        "98e33469399a5885e700ccdcba06845f",
        "bd3d7328be5a50ce139a3250ae824e12",
    )


GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=8)
OTHERS = {
    "model": Namespace(model="n", geometry=GEOMETRY),
    "revision": Namespace(model="m", revision="2", geometry=GEOMETRY),
    "layout": Namespace(model="m", layout="vllm", geometry=GEOMETRY),
    "lora": Namespace(model="m", lora="a@1", geometry=GEOMETRY),
    "salt": Namespace(model="m", salt=b"tenant", geometry=GEOMETRY),
    "dtype": Namespace(model="m", geometry=KVGeometry(layers=2, kv_heads=2, head_dim=8, dtype="float16")),
    "heads": Namespace(model="m", geometry=KVGeometry(layers=2, kv_heads=4, head_dim=4)),
    "block": Namespace(model="m", geometry=KVGeometry(layers=2, kv_heads=2, head_dim=8, block_tokens=32)),
    "planes": Namespace(model="m", geometry=KVGeometry(layers=2, kv_heads=2, head_dim=8, planes=1)),
    "shifted": Namespace(model="m", lora="\x00", geometry=GEOMETRY),
}


def test_every_field_separates_namespaces() -> None:
    digests = {name: namespace.digest() for name, namespace in OTHERS.items()}
    digests["itself"] = Namespace(model="m", geometry=GEOMETRY).digest()
    assert len(set(digests.values())) == len(digests)


def test_fields_cannot_run_into_each_other() -> None:
    one = Namespace(model="ab", revision="c", geometry=GEOMETRY)
    two = Namespace(model="a", revision="bc", geometry=GEOMETRY)
    assert one.digest() != two.digest()


def test_the_salt_is_not_shown() -> None:
    assert "tenant" not in repr(OTHERS["salt"])


def test_roots_of_chunks_know_the_namespace_and_the_positions() -> None:
    root = chunk_root(ROOT, b"rope")
    assert root == hashlib.blake2s(ROOT + b"rope", digest_size=16, person=b"cairn/ck").digest()
    assert len({root, chunk_root(bytes(16), b"rope"), chunk_root(ROOT, b"other"), ROOT}) == 4


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-1, 2], "token id -1: must be in"),
        ([1 << 32], "token id 4294967296: must be in"),
        ([1.5], "must be one row of integers"),
        ([[1, 2]], "must be one row of integers"),
        ([[1, 2], [3]], "in rows of different lengths: must be one row of integers"),
        (["a"], "must be one row of integers"),
    ],
)
def test_what_is_no_token_is_refused_in_one_line(tokens: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        as_tokens(tokens)
    assert "\n" not in str(caught.value)


def test_content_that_is_no_bytes_is_refused_before_anything_is_hashed() -> None:
    """Once a chain has such a block it is too late: keys of it and of what follows would be anything."""
    with pytest.raises(InputError, match=r"extra\[1\] is str: must be bytes"):
        KeyChain(ROOT, 2, (), {1: "image"})  # type: ignore[dict-item]
