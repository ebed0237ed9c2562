"""`cairn bench remote`: the remote tier beside the bare client of the same store, in turns."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from cairn.cli.bench_remote_bare import BareClient, bare_client
from cairn.config.urls import mask_url
from cairn.kv import KeyChain, Keys, KVGeometry, Namespace
from cairn.tier.arena import Arena
from cairn.tier.base import Outcomes, Rows
from cairn.tier.remote import Limits, RemoteTier, open_store

#: 512 KiB a block, as of a model with 2 KV heads in 32 layers; and one so small that only the lookup counts.
BLOCK: Final = KVGeometry(layers=32, kv_heads=2, head_dim=128, block_tokens=16)
SMALL: Final = KVGeometry(layers=1, kv_heads=1, head_dim=8, block_tokens=16)

SIZES_MIB: Final = (1, 4, 16)
ROUND_BYTES: Final = 64 << 20
ROUNDS: Final = 9
THREADS: Final = 4
PREFIX_OBJECTS: Final = 512
LOOKUPS: Final = 5
TIMEOUT_S: Final = 120.0


def run_remote(
    urls: Sequence[str],
    *,
    sizes_mib: Sequence[int] = SIZES_MIB,
    rounds: int = ROUNDS,
    round_bytes: int = ROUND_BYTES,
    prefix_objects: int = PREFIX_OBJECTS,
) -> dict[str, Any]:
    """For each store: MiB/s of loads and stores by object size, the bare client's beside them, and a lookup.

    Some bare clients load to where they are told, as the tier does; what others give as bytes of their own is thrown
    away. A third contender (`landing`) copies that to where it belongs, and a fourth (`summed`) also makes checksums of
    what came: where a store is as fast as memory, that is what proving costs. CPU shares compare the time that this
    process computed, which other work on the machine changes less than what a clock shows.

    Shares are medians over rounds of the ratio within a round; in each round new objects are stored and loaded by the
    tier and by the bare client, with as many threads, who comes first alternating at random. What the tier does beside
    (frames, checksums, rows instead of one buffer) is in its time. Removes what it has stored.
    """
    result: dict[str, Any] = {"threads": THREADS, "rounds": rounds}
    for url in urls:
        figures: dict[str, Any] = {}
        with bare_client(url, THREADS) as bare:
            for size in sizes_mib:
                bench = _Bench(url, bare, size << 20, round_bytes)
                try:
                    bench.round()  # the first round touches memory and makes connections, and is not counted
                    bench.seconds.clear()
                    bench.cpu_seconds.clear()
                    for _ in range(rounds):
                        bench.round()
                    figures[f"{size}_mib"] = bench.result()
                finally:
                    bench.close()
        figures["lookup"] = _lookup(url, prefix_objects)
        result[mask_url(url)] = figures
    return result


def _open(url: str, geometry: KVGeometry, object_bytes: int) -> RemoteTier:
    limits = Limits(timeout_s=TIMEOUT_S, lookup_timeout_s=TIMEOUT_S, threads=THREADS)
    return RemoteTier(open_store(url), geometry=geometry, limits=limits, object_bytes=object_bytes)


class _Bench:
    """A tier, and one arena that it and the bare client move to and from."""

    def __init__(self, url: str, bare: BareClient, object_bytes: int, round_bytes: int) -> None:
        self._bare = bare
        self._namespace = Namespace(model="bench", geometry=BLOCK).digest()
        self._tier = _open(url, BLOCK, object_bytes)
        self._objects = max(1, round_bytes // object_bytes)
        self._pack = self._tier.pack_blocks
        blocks = self._objects * self._pack
        self._bytes = blocks * BLOCK.block_bytes
        self._arena = Arena(blocks, BLOCK.block_bytes)
        self._spare = Arena(blocks, BLOCK.block_bytes)  # where the bare client loads to
        self._rows = Rows(self._arena.memory, np.arange(blocks, dtype=np.int32))
        self._numbers = np.random.default_rng()
        self._random = random.Random(0)
        self.seconds: dict[str, list[float]] = {}
        self.cpu_seconds: dict[str, list[float]] = {}

    def round(self) -> None:
        words = self._arena.memory.view(np.uint64)
        words[:] = self._numbers.integers(0, 1 << 63, words.shape[1], np.uint64)
        words ^= self._numbers.integers(0, 1 << 63, (len(words), 1), np.uint64)
        tokens = self._numbers.integers(0, 1 << 31, len(words) * 16)
        keys = KeyChain(self._namespace, 16, tokens).keys
        wanted = self._arena.memory.copy()
        blobs = [bytes(part.data) for part in wanted.reshape(self._objects, -1)]
        names = [f"bench-{self._numbers.integers(1 << 62)}" for _ in blobs]
        puts = list(zip(names, blobs, strict=True))
        self._race({"store": lambda: self._store(keys), "bare_store": lambda: self._bare.put(puts)})
        self._arena.memory[:] = 0
        targets = [part.data for part in self._spare.memory.reshape(self._objects, -1)]
        gets = list(zip(names, targets, strict=True))
        self._spare.memory[:] = 0
        loads = {
            "load": lambda: self._load(keys),
            "bare_load": lambda: self._bare.get(gets, land=False),
            "summed_load": lambda: self._bare.get(gets, summed_bytes=BLOCK.block_bytes),
        }
        if not self._bare.lands:
            loads["landing_load"] = lambda: self._bare.get(gets)
        self._race(loads)
        if not np.array_equal(self._spare.memory, wanted):
            raise AssertionError("the bare client did not move what was timed")
        if not np.array_equal(self._arena.memory, wanted):
            raise AssertionError("the bench did not move what it timed")
        self._bare.delete(names)
        for end in range(self._pack - 1, len(keys), self._pack):
            self._tier.remove(keys[end])

    def result(self) -> dict[str, float]:
        figures = {}
        for other in ("summed", "landing"):
            if f"{other}_load" in self.seconds:
                figures[f"load_share_of_{other}_bare"] = _share(self.seconds, "load", f"{other}_load")
                figures[f"load_cpu_share_of_{other}_bare"] = _share(self.cpu_seconds, "load", f"{other}_load")
        for kind in ("load", "store"):
            mine, bare = self.seconds[kind], self.seconds[f"bare_{kind}"]
            figures[f"{kind}_share_of_bare"] = _share(self.seconds, kind, f"bare_{kind}")
            figures[f"{kind}_cpu_share_of_bare"] = _share(self.cpu_seconds, kind, f"bare_{kind}")
            figures[f"{kind}_mib_per_s"] = round(self._bytes / statistics.median(mine) / (1 << 20))
            figures[f"bare_{kind}_mib_per_s"] = round(self._bytes / statistics.median(bare) / (1 << 20))
        return figures

    def close(self) -> None:
        self._tier.close(TIMEOUT_S)

    def _race(self, contenders: dict[str, Callable[[], None]]) -> None:
        runs = list(contenders.items())
        self._random.shuffle(runs)
        for name, run in runs:
            started, computed = time.perf_counter(), time.process_time()
            run()
            self.cpu_seconds.setdefault(name, []).append(time.process_time() - computed)
            self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def _store(self, keys: Keys) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        _check(self._tier.write(keys, 0, self._rows, namespace=self._namespace, deadline=deadline).result(TIMEOUT_S))

    def _load(self, keys: Keys) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        _check(self._tier.read(keys, 0, self._rows, deadline=deadline).result(TIMEOUT_S))


def _share(seconds: dict[str, list[float]], mine: str, other: str) -> float:
    """How fast one is beside the other: the median over rounds."""
    return round(statistics.median(b / m for m, b in zip(seconds[mine], seconds[other], strict=True)), 3)


def _lookup(url: str, objects: int) -> dict[str, float]:
    """What it takes to learn how much of a prompt of `objects` objects is there, by who has never asked."""
    namespace = Namespace(model="bench", geometry=SMALL).digest()
    keys = KeyChain(namespace, 16, np.random.default_rng().integers(0, 1 << 31, objects * 16)).keys
    rows = Rows(Arena(1, 4096).memory, np.zeros(objects, np.int32))
    deadline = time.monotonic() + TIMEOUT_S
    seconds, trips = [], []
    writer = _open(url, SMALL, 1)
    try:
        _check(writer.write(keys, 0, rows, namespace=namespace, deadline=deadline).result(TIMEOUT_S))
        for _ in range(LOOKUPS):
            tier = _open(url, SMALL, 1)
            try:
                tier.ask(keys[:1], deadline=deadline)  # makes the connection
                before = tier.stats()["round_trips_total"]
                started = time.perf_counter()
                answer = tier.ask(keys, deadline=deadline)
                if answer is not None:
                    answer.result(TIMEOUT_S)
                seconds.append(time.perf_counter() - started)
                trips.append(int(tier.stats()["round_trips_total"] - before))
                if tier.match(keys) != objects:
                    raise AssertionError(f"the lookup found {tier.match(keys)} of {objects} objects")
            finally:
                tier.close(TIMEOUT_S)
        for key in keys:
            writer.remove(key)
    finally:
        writer.close(TIMEOUT_S)
    return {"objects": objects, "round_trips": max(trips), "ms": round(1000 * statistics.median(seconds), 2)}


def _check(outcomes: Outcomes) -> None:
    if set(outcomes) != {None}:
        raise AssertionError(f"the bench did not move what it timed: {set(outcomes)}")
