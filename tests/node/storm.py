"""Clients of a node that store, retrieve and give up at random, and check every byte; made to be killed.

What a block holds is its key, again and again, so that a byte of another block is seen wherever it stands.
"""

import signal
import time
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.engine.vram_pool import VramHold
from cairn.kv import KeyChain, KVGeometry, Namespace

GEOMETRY = KVGeometry(layers=4, kv_heads=2, head_dim=64, dtype="float16", block_tokens=16)
BLOCK = GEOMETRY.block_tokens
PAGES = 64
EMPTY = 0xDEAD

#: What a client tells of itself, by place in its array of doubles.
CALLS, HITS, STORED, WRONG, LONGEST_S, STOPS, LINKED, REFUSED, IN_VRAM, OWNER_GONE = range(10)
FIGURES = 10


def tokens_of(rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Prompts are paths in a small tree: they share prefixes, and there are more blocks than the pool takes."""
    places = np.arange(int(rng.integers(1, PAGES * BLOCK)), dtype=np.uint32)
    return places + 5000 * rng.integers(0, 6) * (places >= rng.choice([0, 160, 480]))


def blocks_of(chain: KeyChain) -> npt.NDArray[np.uint16]:
    """What prefill would write: uint16 [block, layer, plane, token, head, dim]."""
    keys = np.ascontiguousarray(chain.keys).view(np.uint16)
    places = np.arange(GEOMETRY.layers * 2, dtype=np.uint16).reshape(GEOMETRY.layers, 2, 1)
    vectors = keys[:, None, None, :] ^ (places * 0x1111)[None]
    repeats = BLOCK * GEOMETRY.kv_heads * GEOMETRY.head_dim // 8
    return np.tile(vectors, repeats).reshape(len(keys), *GEOMETRY.block_shape)


class Cache:
    """A paged cache, [2, pages, page tokens, heads, dim] a layer, and pages in random order."""

    def __init__(self, rng: np.random.Generator) -> None:
        shape = (2, PAGES, BLOCK, GEOMETRY.kv_heads, GEOMETRY.head_dim)
        self.tensors = [np.full(shape, EMPTY, np.uint16) for _ in range(GEOMETRY.layers)]
        self.pages = rng.permutation(PAGES)

    def slots(self, count: int) -> npt.NDArray[np.int64]:
        return (self.pages[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[:count].astype(np.int64)

    def fill(self, blocks: npt.NDArray[np.uint16]) -> None:
        for layer, tensor in enumerate(self.tensors):
            tensor[:, self.pages[: len(blocks)]] = blocks[:, layer].swapaxes(0, 1)

    def holds(self, blocks: npt.NDArray[np.uint16], loaded: int, beyond: bool) -> bool:
        """Whether the first `loaded` blocks are there, and nothing else was touched, or nothing `beyond` the prompt."""
        rest = self.pages[len(blocks) if beyond else loaded :]
        return all(
            (tensor[:, self.pages[:loaded]] == blocks[:loaded, layer].swapaxes(0, 1)).all()
            and (tensor[:, rest] == EMPTY).all()
            for layer, tensor in enumerate(self.tensors)
        )


class Doubted:
    """Counts copies out of VRAM that were made and then not believed: whatever the miss is put down to, slots were
    written.
    """

    def __init__(self) -> None:
        self.copies = 0
        scatter = VramHold.scatter

        def counted(hold: VramHold, *args: Any) -> bool:
            believed = scatter(hold, *args)
            self.copies += not believed
            return believed

        VramHold.scatter = counted  # type: ignore[assignment,method-assign]


def client(address: str, seed: int, vram_blocks: int, told: "SynchronizedArray[float]") -> None:
    """Works until it is killed. vram_blocks: what it donates, on the stand-in."""
    rng = np.random.default_rng(seed)
    vram = {"storage.vram.size": vram_blocks * GEOMETRY.block_bytes, "storage.vram.device": "stand-in"}
    settings = load_config(environ={}, overrides={"engine.planner": False, "engine.copy_threads": 1, **vram})
    engine = CacheEngine(Namespace(model="m", geometry=GEOMETRY), settings, node=address)
    doubted = Doubted()
    while True:
        step(engine, rng, told, doubted)


def step(engine: CacheEngine, rng: np.random.Generator, told: Any, doubted: Doubted) -> None:
    tokens, cache = tokens_of(rng), Cache(rng)
    chain = engine.chain(tokens)
    figures: Any = engine.metrics
    blocks, slots, action = blocks_of(chain), cache.slots(len(tokens)), rng.integers(10)

    def timed(call: Any) -> Any:
        stops = told[STOPS]
        started = time.monotonic()
        result = call()
        if told[STOPS] == stops and stops % 2 == 0:  # not while somebody had stopped this process
            told[LONGEST_S] = max(told[LONGEST_S], time.monotonic() - started)
        told[CALLS] += 1
        return result

    if action < 4:
        cache.fill(blocks)
        told[STORED] += timed(lambda: engine.store(chain, None, cache.tensors, slots))
    elif action < 8:
        timeout, before = float(rng.choice([0.0, 0.01, 1.0, 1.0])), doubted.copies
        mask = timed(lambda: engine.retrieve(chain, None, cache.tensors, slots, timeout=timeout))
        loaded = int(np.count_nonzero(mask))
        told[HITS] += loaded
        if loaded % BLOCK or not cache.holds(blocks, loaded // BLOCK, doubted.copies > before):
            told[WRONG] += 1
    elif action == 8:
        cache.fill(blocks)
        kv = engine.register_kv_caches(cache.tensors)
        store = timed(lambda: engine.store_layers(chain))
        if store:
            part = slots[store.first_block * BLOCK : (store.first_block + store.blocks) * BLOCK]
            for layer in range(GEOMETRY.layers - int(rng.integers(2))):
                store.put(layer, kv, part)
            if rng.random() < 0.5 and not store._missing:
                timed(store.commit)
            timed(store.abort)
    else:
        task = timed(lambda: engine.prefetch_async(chain))
        if rng.random() < 0.5:
            engine.cancel([task])
        timed(lambda: engine.wait([task], timeout=1.0))
    node: Any = engine._store._client  # type: ignore[attr-defined]
    told[LINKED] = node.links
    if node.link is None:  # what is missed at once, again and again, takes the next node's processor
        signal.sigtimedwait([], 0.02)
    told[REFUSED] = figures.miss_tokens.value(reason="node_away")
    told[IN_VRAM] = figures.hit_tokens.value(tier="vram")
    told[OWNER_GONE] = figures.miss_tokens.value(reason="owner_gone")
