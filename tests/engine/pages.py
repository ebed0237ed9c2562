"""A small paged KV cache whose right contents are a function of the tokens, so that any reuse can be checked."""

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.kv import KVGeometry, Namespace

BLOCK = 4
GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=8, dtype="float16", block_tokens=BLOCK)
#: A DRAM slot: a block rounded up to a page.
SLOT = 4096
SLOTS = 256


def namespace(**fields: Any) -> Namespace:
    return Namespace(**{"model": "m", "geometry": GEOMETRY, **fields})


def make_engine(dram_blocks: int, disk: Path | None = None, disk_size: int = 1 << 20, **settings: Any) -> CacheEngine:
    overrides: dict[str, Any] = {"storage.cpu.size": dram_blocks * SLOT, "engine.copy_threads": 1, **settings}
    if disk:
        overrides |= {"storage.disk.path": str(disk), "storage.disk.size": disk_size, "storage.disk.threads": 2}
    return CacheEngine(namespace(), load_config(environ={}, overrides=overrides))


def kv_of(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """What prefill would write: [token, layer, plane, dim], a value that depends on the whole prefix."""
    states = np.empty(len(tokens), np.int64)
    state = 0
    for i, token in enumerate(tokens):
        state = zlib.crc32(int(token).to_bytes(4, "little"), state)
        states[i] = state
    places = np.arange(GEOMETRY.layers * 2 * GEOMETRY.head_dim).reshape(GEOMETRY.layers, 2, GEOMETRY.head_dim)
    return ((states[:, None, None, None] * 31 + places * 977) % 65521).astype(np.uint16)


class Pages:
    """The engine's side: tensors [2, pages, page_tokens, 1, dim] a layer, and slots for one prompt at a time."""

    def __init__(self, seed: int = 0) -> None:
        shape = (2, SLOTS // BLOCK, BLOCK, 1, GEOMETRY.head_dim)
        self.tensors = [np.zeros(shape, np.uint16) for _ in range(GEOMETRY.layers)]
        self._rng = np.random.default_rng(seed)

    def slots(self, count: int) -> npt.NDArray[np.int64]:
        return self._rng.permutation(SLOTS)[:count]

    def prefill(self, tokens: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
        values = kv_of(tokens)
        for layer, tensor in enumerate(self.tensors):
            flat = tensor.reshape(2, SLOTS, GEOMETRY.head_dim)
            flat[:, slots] = values[:, layer].transpose(1, 0, 2)

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor[:] = 0xDEAD

    def holds(self, tokens: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], mask: Any) -> bool:
        """Whether the slots of masked tokens hold what prefill writes and all other slots are as `clear` left them."""
        mask = np.asarray(mask)
        values = kv_of(tokens)
        for layer, tensor in enumerate(self.tensors):
            expected = np.full((2, SLOTS, GEOMETRY.head_dim), 0xDEAD, np.uint16)
            expected[:, slots[mask]] = values[mask][:, layer].transpose(1, 0, 2)
            if (tensor.reshape(2, SLOTS, GEOMETRY.head_dim) != expected).any():
                return False
        return True


def prompt(seed: int, length: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 1000, length)


def stored(engine: CacheEngine, tokens: npt.NDArray[np.int64]) -> int:
    """Prefills and stores a prompt; returns how many tokens became resident."""
    pages = Pages()
    slots = pages.slots(len(tokens))
    pages.prefill(tokens, slots)
    return engine.store(tokens, None, pages.tensors, slots)


def retrieved(engine: CacheEngine, tokens: npt.NDArray[np.int64], **arguments: Any) -> int:
    """Retrieves a prompt into a cleared cache, checks every byte of it, and returns how many tokens came."""
    pages = Pages(1)
    slots = pages.slots(len(tokens))
    pages.clear()
    mask = engine.retrieve(tokens, arguments.pop("mask", None), pages.tensors, slots, **arguments)
    assert pages.holds(tokens, slots, mask), "what was retrieved is wrong, or more was written than was reported"
    return int(np.count_nonzero(mask))


def at_rest(engine: CacheEngine) -> None:
    """Nothing stays pinned or reserved: what is under way (writes, reads whose hold was released) ends by itself."""
    assert engine.flush(10)
    deadline = time.monotonic() + 10
    while (busy := _busy_rows(engine)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not busy, f"{busy} rows are still pinned or reserved"


def _busy_rows(engine: CacheEngine) -> float:
    dram: Any = engine.get_stats()["tiers"]["dram"]  # type: ignore[index,call-overload]
    return float(dram["pinned_blocks"] + dram["reserved_blocks"])
