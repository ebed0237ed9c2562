"""What being watched costs: the paths of `cairn bench engine` with counters and spans, and without, in turns.

Without means that each of their calls does nothing; calling a function that does nothing is left in both.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.cli.bench_engine import LLAMA_8B, LOOKUP_BLOCKS, SMALL
from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.engine import core as engine_core
from cairn.kv import KeyChain, KVGeometry, Namespace
from cairn.observe.layers import LayerTimes
from cairn.observe.metrics import Counter, Histogram, Ticks
from cairn.observe.trace import NO_SPAN

_BLOCKS: Final = 64
_ROUNDS: Final = 60
#: Short calls are timed together; fewer of those that make their chain longer.
_LOOKUPS: Final = 500
_EXTENSIONS: Final = 20

#: A path: what is timed, a round's number at a time. It is the same work each time.
Path = Callable[[int], object]


def run_observe() -> dict[str, Any]:
    """By path: seconds of a call with and without, and by how many percent being watched makes it longer: the median
    over the rounds, in each of which both are run, the first in turns.
    """
    with ExitStack() as stack:
        large, small = (stack.enter_context(_engine(geometry)) for geometry in (LLAMA_8B, SMALL))
        paths = {**_copies(large), **_lookups(small)}
        ticks = large.metrics.lookups, small.metrics.lookups
        return {name: _compared(path, calls, ticks) for name, (path, calls) in paths.items()}


def _engine(geometry: KVGeometry) -> CacheEngine:
    blocks = LOOKUP_BLOCKS + 2 if geometry is SMALL else _BLOCKS
    overrides = {
        "storage.cpu.size": blocks * max(4096, geometry.block_bytes),
        "engine.timeout_s": 60,
        "engine.lease_s": 60,
    }
    return CacheEngine(Namespace(model="bench", geometry=geometry), load_config(environ={}, overrides=overrides))


def _copies(engine: CacheEngine) -> dict[str, tuple[Path, int]]:
    tokens = _BLOCKS * LLAMA_8B.block_tokens
    shape = (2, _BLOCKS, LLAMA_8B.block_tokens, LLAMA_8B.kv_heads, LLAMA_8B.head_dim)
    kv = engine.register_kv_caches([np.ones(shape, np.uint16) for _ in range(LLAMA_8B.layers)])
    slots = np.arange(tokens)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100_000, tokens, dtype=np.uint32) for _ in range(2 * _ROUNDS + 2)]

    def store(number: int) -> None:
        if engine.store(prompts[number], None, kv, slots) != tokens:
            raise AssertionError("the bench did not store what it timed")

    def retrieve(number: int) -> None:
        if number < 0:
            engine.store(prompts[-1], None, kv, slots)  # the only one that there is room for
        if not engine.retrieve(prompts[-1], None, kv, slots).all():
            raise AssertionError("the bench did not load what it timed")

    def load_layers(_: int) -> None:
        with engine.stage(engine.chain(prompts[-1])) as stage:
            load = stage.load_layers(kv, slots)
            if not all(load.wait(layer, 60) for layer in range(LLAMA_8B.layers)):
                raise AssertionError("the bench did not load what it timed")

    return {"store": (store, 1), "retrieve": (retrieve, 1), "load_layers": (load_layers, 1)}


def _lookups(engine: CacheEngine) -> dict[str, tuple[Path, int]]:
    tokens = np.random.default_rng(1).integers(0, 100_000, LOOKUP_BLOCKS * SMALL.block_tokens, dtype=np.uint32)
    pages = [np.zeros((2, LOOKUP_BLOCKS, SMALL.block_tokens, 2, 32), np.uint16) for _ in range(SMALL.layers)]
    engine.store(tokens, None, pages, np.arange(len(tokens)))
    chain, growing, more = engine.chain(tokens), engine.chain(tokens), tokens[: SMALL.block_tokens]

    def lookup(_: int) -> None:
        _check(engine, tokens)

    def lookup_chain(_: int) -> None:
        for _ in range(_LOOKUPS):
            _check(engine, chain)

    def lookup_extended(_: int) -> None:
        for _ in range(_EXTENSIONS):
            growing.extend(more)  # beyond what is held
            _check(engine, growing)

    return {
        "lookup_8192_blocks": (lookup, 1),
        "lookup_8192_blocks_hashed": (lookup_chain, _LOOKUPS),
        "lookup_extended_by_one_block": (lookup_extended, _EXTENSIONS),
    }


def _check(engine: CacheEngine, prompt: KeyChain | npt.NDArray[np.uint32]) -> None:
    if engine.lookup(prompt) != LOOKUP_BLOCKS * SMALL.block_tokens:
        raise AssertionError("the bench did not find what it looked up")


def _compared(path: Path, calls: int, ticks: Iterable[Ticks]) -> dict[str, float]:
    for number in (-2, -1):
        path(number)  # compiles and touches
    numbers = iter(range(2 * _ROUNDS))
    watched, unwatched = list[float](), list[float]()
    for i in range(_ROUNDS):
        without = _nothing_watched(ticks)
        for times, way in ((watched, nullcontext()), (unwatched, without))[:: 1 if i % 2 else -1]:
            with way:
                started = time.perf_counter()
                path(next(numbers))
                times.append(time.perf_counter() - started)
    cost = statistics.median(a / b for a, b in zip(watched, unwatched, strict=True)) - 1
    return {
        "watched_us": round(statistics.median(watched) / calls * 1e6, 2),
        "unwatched_us": round(statistics.median(unwatched) / calls * 1e6, 2),
        "cost_percent": round(100 * cost, 2),
    }


@contextmanager
def _nothing_watched(ticks: Iterable[Ticks]) -> Iterator[None]:
    def nothing(*_: object, **__: object) -> None:
        pass

    places: list[tuple[Any, str, Any]] = [
        (Counter, "add", nothing),
        (Histogram, "observe", nothing),
        (LayerTimes, "copied", nothing),
        (LayerTimes, "waited", nothing),
        (engine_core, "begin", lambda *_, **__: NO_SPAN),
        *((one, "tick", nothing) for one in ticks),
    ]
    kept = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, instead in places:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for (owner, name, _), before in zip(places, kept, strict=True):
            setattr(owner, name, before)
