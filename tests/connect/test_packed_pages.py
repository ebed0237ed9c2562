"""Pages that hold a token's K and V in one run, as vLLM's FlashAttention has them, moved token by token."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cairn.kv import KVGeometry
from tests.copy.fake_cuda import FakeCuda, install

pytest.importorskip("triton")

G = KVGeometry(layers=3, kv_heads=2, head_dim=4, dtype="float16", block_tokens=4)
PAGES, BLOCKS = 8, 5


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr("cairn.copy.cuda._STAGING_BYTES", 2 * G.block_bytes)
    monkeypatch.setattr("cairn.copy.cuda._FIRST_BYTES", G.block_bytes)
    return install(monkeypatch, 0)


def pages(rng: np.random.Generator) -> list[Any]:
    """[pages, heads, tokens, 2 * dim] a layer, in the memory order of tokens and then heads."""
    shape = (PAGES, G.block_tokens, G.kv_heads, 2 * G.head_dim)
    return [rng.integers(0, 1 << 16, shape, dtype=np.uint16).transpose(0, 2, 1, 3) for _ in range(G.layers)]


@pytest.mark.usefixtures("device")
def test_tokens_go_to_any_slot() -> None:
    from cairn.connect.vllm.cuda_mover import CudaMover
    from cairn.connect.vllm.movers import token_geometry
    from cairn.copy import PagedKV

    rng = np.random.default_rng(5)
    tensors = pages(rng)
    memory = np.zeros((BLOCKS, G.block_bytes), np.uint8)
    rows = rng.permutation(BLOCKS).astype(np.int32)
    here = rng.permutation(PAGES)[:BLOCKS]
    opaque = dataclasses.replace(PagedKV.from_tensors(tensors, "vllm", G), device=0)
    whole = CudaMover(G, opaque, memory, memory, overlapping=False)
    whole.store((here[:, None] * 4 + np.arange(4)).reshape(-1), rows).result()

    before = [tensor.copy() for tensor in tensors]
    expected = [tensor.copy() for tensor in tensors]
    slots = np.full(BLOCKS * 4, -1, np.int64)
    slots[3:17] = np.arange(3, 17) + 6  # a chunk that begins and ends inside of a block, moved by a page and a half
    for old, new in zip(before, expected, strict=True):
        for token in range(3, 17):
            new[slots[token] // 4, :, slots[token] % 4] = old[here[token // 4], :, token % 4]
    by_token = token_geometry(G)
    kv = PagedKV.from_tensors([t.transpose(0, 2, 1, 3).reshape(PAGES, 4, -1) for t in tensors], "mla", by_token)
    mover = CudaMover(by_token, dataclasses.replace(kv, device=0), memory, memory, overlapping=False)
    load = mover.load_layers(slots, rows)
    for layer in range(G.layers):
        load.wait(layer, 60)
    assert load.end().result() >= 0
    for found, right in zip(tensors, expected, strict=True):
        assert (found == right).all()
    whole.by_token = mover
    whole.close()
