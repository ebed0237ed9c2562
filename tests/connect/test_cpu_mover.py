"""Copies of a worker on a CPU: what is under way is finished, and vLLM's tensors are known by their shape."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from cairn.connect.vllm.movers import CpuMover, mover_for
from cairn.copy import CpuCopier
from cairn.kv import KVGeometry
from cairn.tier.arena import Arena

G = KVGeometry(layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=4)
BLOCKS = 6


def test_copies_that_wait_for_their_turn_are_made_before_a_mover_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node was started again, and its former arena is left behind: the model's thread still asks what became of
    these.
    """
    arena, caches = Arena(BLOCKS, 4096), [torch.zeros(2, BLOCKS, 4, 2, 8) for _ in range(G.layers)]
    arena.memory[:] = np.random.default_rng(0).integers(0, 60, arena.memory.shape)
    mover = mover_for(caches, G, arena.memory[:, : G.block_bytes], arena.memory, threads=1, overlapping=False)
    assert isinstance(mover, CpuMover)
    go, scatter, shutdown = threading.Event(), CpuCopier.scatter, mover._pool.shutdown

    def waits(*arguments: Any) -> None:
        assert go.wait(60)
        scatter(*arguments)

    def closes(**how: bool) -> None:
        shutdown(**{**how, "wait": False})
        go.set()
        shutdown(wait=True)

    monkeypatch.setattr(CpuCopier, "scatter", waits)
    monkeypatch.setattr(mover._pool, "shutdown", closes)
    loads = [mover.load(np.arange(4) + 4 * i, np.array([i], np.int32)) for i in range(BLOCKS)]
    mover.close()
    assert [load.exception() for load in loads] == [None] * BLOCKS
    rows = torch.from_numpy(arena.memory[:, : G.block_bytes].copy()).view(torch.float32)
    for layer, held in enumerate(rows.view(BLOCKS, G.layers, 2, 4, 2, 8).unbind(1)):
        assert torch.equal(caches[layer], held.transpose(0, 1))


@pytest.mark.parametrize("shape", [(BLOCKS, 4, 24), (BLOCKS, 1, 4, 24)])
def test_an_mla_latent_with_and_without_a_head_of_its_own(shape: tuple[int, ...]) -> None:
    """vLLM's caches up to 0.31, and since."""
    latent = KVGeometry(layers=2, kv_heads=1, head_dim=24, dtype="float32", block_tokens=4, planes=1)
    caches, memory = [torch.rand(shape) for _ in range(2)], np.zeros((BLOCKS, latent.block_bytes), np.uint8)
    mover = mover_for(caches, latent, memory, memory, threads=1, overlapping=False)
    assert mover.store(np.arange(4 * BLOCKS), np.arange(BLOCKS, dtype=np.int32)).exception() is None
    mover.close()
    rows = torch.from_numpy(memory).view(torch.float32).view(BLOCKS, 2, 4, 24)
    assert torch.equal(rows, torch.stack([cache.view(BLOCKS, 4, 24) for cache in caches], 1))
