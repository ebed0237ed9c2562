"""`cairn bench engine`: how close DRAM <-> paged cache comes to memcpy, and what a lookup costs."""

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.kv import KeyChain, KVGeometry, Namespace

#: Llama-3.1-8B: 2 MiB a block of 16 tokens.
LLAMA_8B = KVGeometry(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
#: A block of 4 KiB, so that an index of many blocks fits beside it.
SMALL = KVGeometry(layers=2, kv_heads=2, head_dim=32, dtype="bfloat16", block_tokens=16)

BLOCKS = 256
ROUNDS = 7
LOOKUP_BLOCKS = 8192
LOOKUP_ROUNDS = 41

Bytes = npt.NDArray[np.uint8]


def run_engine() -> dict[str, Any]:
    """Medians; store, retrieve and memcpy interleaved, with the same number of threads, over the same bytes."""
    return {**bench_copies(), **_bench_lookup()}


def bench_copies(node: str | None = None) -> dict[str, Any]:
    """node: the address of one that keeps the blocks; None: the engine itself."""
    size = BLOCKS * LLAMA_8B.block_bytes
    config = load_config(environ={}, overrides={"storage.cpu.size": size, "engine.timeout_s": 60, "engine.lease_s": 60})
    rng = np.random.default_rng(0)
    pages, target = _cache(rng), _cache(rng)
    slots = _slots(rng)
    prompts = [rng.integers(0, 100_000, BLOCKS * 16, dtype=np.uint32) for _ in range(ROUNDS + 1)]
    threads = config.engine.copy_threads
    seconds: dict[str, list[float]] = {"memcpy": [], "store": [], "retrieve": []}
    with CacheEngine(Namespace(model="bench", geometry=LLAMA_8B), config, node=node) as engine:
        memcpy = _Memcpy(size, LLAMA_8B.block_bytes, threads)
        for prompt in prompts:
            seconds["memcpy"].append(_timed(memcpy.run))
            seconds["store"].append(_timed(lambda p=prompt: engine.store(p, None, pages, slots)))  # type: ignore[misc]
            seconds["retrieve"].append(_timed(lambda p=prompt: engine.retrieve(p, None, target, slots)))  # type: ignore[misc]
        hits = engine.get_stats()["hit_tokens"]
    if hits != {"dram": (ROUNDS + 1) * BLOCKS * 16} or any((a != b).any() for a, b in zip(pages, target, strict=True)):
        raise AssertionError("the bench did not move what it timed")
    # The first round compiles and touches; it is not counted.
    speed = {name: size / statistics.median(values[1:]) / 1e9 for name, values in seconds.items()}
    return {
        "block_bytes": LLAMA_8B.block_bytes,
        "blocks": BLOCKS,
        "copy_threads": threads,
        "memcpy_gb_per_s": round(speed["memcpy"], 2),
        "store_gb_per_s": round(speed["store"], 2),
        "retrieve_gb_per_s": round(speed["retrieve"], 2),
        "store_share_of_memcpy": round(speed["store"] / speed["memcpy"], 3),
        "retrieve_share_of_memcpy": round(speed["retrieve"] / speed["memcpy"], 3),
    }


def _bench_lookup() -> dict[str, Any]:
    tokens = np.random.default_rng(1).integers(0, 100_000, (LOOKUP_BLOCKS + LOOKUP_ROUNDS) * 16, dtype=np.int32)
    prompt = tokens[: LOOKUP_BLOCKS * 16]
    config = load_config(environ={}, overrides={"storage.cpu.size": 2 * LOOKUP_BLOCKS * SMALL.block_bytes})
    with CacheEngine(Namespace(model="bench", geometry=SMALL), config) as engine:
        pages = [np.zeros((2, len(tokens) // 16, 16, 2, 32), np.uint16) for _ in range(SMALL.layers)]
        engine.store(tokens, None, pages, np.arange(len(tokens)), timeout=60)
        whole = [_timed(lambda: _expect(engine.lookup(prompt), len(prompt))) for _ in range(LOOKUP_ROUNDS)]
        hashing = [_timed(lambda: engine.chain(prompt)) for _ in range(LOOKUP_ROUNDS)]
        chain = engine.chain(prompt)
        extended = []
        for i in range(LOOKUP_ROUNDS):
            more = tokens[(LOOKUP_BLOCKS + i) * 16 : (LOOKUP_BLOCKS + i + 1) * 16]
            extended.append(_timed(lambda m=more: _extend(engine, chain, m)))  # type: ignore[misc]
    return {
        "lookup_us_8192_blocks": round(statistics.median(whole) * 1e6, 1),
        "lookup_hashing_us": round(statistics.median(hashing) * 1e6, 1),
        "lookup_us_extended_by_one_block": round(statistics.median(extended) * 1e6, 1),
    }


def _extend(engine: CacheEngine, chain: KeyChain, more: npt.NDArray[np.int32]) -> None:
    chain.extend(more)
    _expect(engine.lookup(chain), chain.tokens)


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise AssertionError(f"{found} tokens found, {wanted} stored")


def _cache(rng: np.random.Generator) -> list[npt.NDArray[np.uint16]]:
    shape = (2, BLOCKS, LLAMA_8B.block_tokens, LLAMA_8B.kv_heads, LLAMA_8B.head_dim)
    return [rng.integers(0, 1 << 16, shape, dtype=np.uint16) for _ in range(LLAMA_8B.layers)]


def _slots(rng: np.random.Generator) -> npt.NDArray[np.int64]:
    pages = rng.permutation(BLOCKS)
    return (pages[:, None] * LLAMA_8B.block_tokens + np.arange(LLAMA_8B.block_tokens)).ravel()


class _Memcpy:
    """Bare memmove of blocks in random order, shared among as many threads as the engine copies with."""

    def __init__(self, size: int, block: int, threads: int) -> None:
        self._source, self._target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        self._block = block
        order = np.random.default_rng(2).permutation(size // block)
        self._shares = np.array_split(order, threads)
        self._pool = ThreadPoolExecutor(threads)

    def run(self) -> None:
        list(self._pool.map(self._copy, self._shares))

    def _copy(self, blocks: npt.NDArray[np.int64]) -> None:
        source, target = self._source.ctypes.data, self._target.ctypes.data
        for block in blocks:
            offset = int(block) * self._block
            ctypes.memmove(target + offset, source + offset, self._block)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
