"""Pools: an arena, an index and the tiers below for each geometry and layout that clients have, within one budget.

A pool a geometry and not one arena for all: a row is a block, so blocks of different sizes would split or waste rows,
and one that is found is copied as it stands, so rows of different layouts would be mistaken for each other; with one
pool for several models the busiest would evict the others' blocks, whose worth its policy cannot compare. Models of
equal geometry and layout share a pool, apart by their namespaces. `node.pools` says how many equal parts there are.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from cairn.config import Config
from cairn.errors import StorageError
from cairn.index import POLICIES
from cairn.kv import CANONICAL, KVGeometry, Layout
from cairn.node.base import OpenStore, PoolStore
from cairn.node.segments import Segments
from cairn.node.vram import VramDirectory
from cairn.tier.arena import Arena
from cairn.tier.dram import arena_shape

log = logging.getLogger(__name__)

#: The tier that the node keeps no blocks of, but a directory.
VRAM: Final = "vram"


class Pool:
    """The blocks of one geometry and layout (`kind`).

    sessions: those that use it, ended ones that are still waited for included. idle_since: when the last one ended,
    monotonic. metrics: what is counted of it. vram: what is in its clients' VRAM; retired: see `VramDirectory`.
    """

    def __init__(
        self,
        config: Config,
        geometry: KVGeometry,
        layout: Layout,
        name: str,
        open_store: OpenStore,
        retired: Callable[[int], None],
    ) -> None:
        """Takes and faults in the arena, and opens what is below it: seconds for a large one. Raises CairnError."""
        own = config_of_pool(config, geometry, layout)
        self.kind = geometry, layout
        self.arena = name
        self.slots, self.stride = arena_shape(geometry.block_bytes, own.storage.cpu.size)
        self.vram = VramDirectory(POLICIES[own.storage.vram.policy], retired)
        self.sessions = 0
        self.idle_since = time.monotonic()
        arena = Arena.shared(name, self.slots, self.stride)
        try:
            self.store: PoolStore
            self.store, self.metrics = open_store(own, geometry, layout, arena)
            self.metrics.watch(VRAM, self.vram.figures)
        except BaseException:
            Arena.unlink(name)
            raise

    def close(self, timeout: float) -> None:
        """Flushes what is below, and takes the arena's name away. Waits for the disk."""
        self.vram.close()
        self.store.close(timeout)
        Arena.unlink(self.arena)


class Pools:
    """All pools of a node. For its loop alone; what takes time is done by a thread, which calls `done` after it."""

    def __init__(
        self,
        config: Config,
        segments: Segments,
        open_store: OpenStore,
        done: Callable[[], None],
        retired: Callable[[int], None],
    ) -> None:
        self._config = config
        self._segments = segments
        self._open_store = open_store
        self._done = done
        self._retired = retired
        self._pools: dict[tuple[KVGeometry, Layout], Pool] = {}
        self._opening: dict[tuple[KVGeometry, Layout], Future[Pool]] = {}
        self._numbers = 0
        self._opener = ThreadPoolExecutor(1, "cairn-node-open")

    def __iter__(self) -> Iterator[Pool]:
        return iter(list(self._pools.values()))

    def get(self, geometry: KVGeometry, layout: Layout) -> Pool | None:
        """The pool of such rows; None: it is being opened, ask again. Raises CairnError where there can be none."""
        kind = geometry, layout
        if kind in self._pools:
            return self._pools[kind]
        opening = self._opening.get(kind)
        if opening is None:
            layout.check(geometry)
            self._open(geometry, layout)
            return None
        if not opening.done():
            return None
        del self._opening[kind]
        pool = self._pools[kind] = opening.result()
        log.info("pool of %s: %d blocks of %d bytes", geometry, pool.slots, pool.stride)
        return pool

    def close(self, timeout: float) -> None:
        """Closes all, one after the other, each with what is left of `timeout`."""
        deadline = time.monotonic() + timeout
        self._opener.shutdown(wait=True, cancel_futures=True)
        opened = [future for future in self._opening.values() if not future.cancelled() and not future.exception()]
        for pool in [*self._pools.values(), *(future.result() for future in opened)]:
            pool.close(max(0.0, deadline - time.monotonic()))
        self._pools.clear()

    def _open(self, geometry: KVGeometry, layout: Layout) -> None:
        config = self._config
        for kind, opened in list(self._opening.items()):
            if opened.done():  # who asked for it has not come again, and may never
                del self._opening[kind]
                if not opened.exception():
                    self._pools[kind] = opened.result()
        leaving: Pool | None = None
        if len(self._pools) + len(self._opening) >= config.node.pools:
            idle = [pool for pool in self._pools.values() if not pool.sessions]
            if not idle:
                raise StorageError(
                    f"{geometry}: the node has its {config.node.pools} pool(s) in use; raise node.pools there"
                )
            leaving = min(idle, key=lambda pool: pool.idle_since)
            del self._pools[leaving.kind]
        self._numbers += 1
        name = self._segments.arena(self._numbers)

        def task() -> Pool:
            if leaving:
                log.info("pool of %s gives way", leaving.kind)
                leaving.close(config.engine.timeout_s)
            return Pool(config, geometry, layout, name, self._open_store, self._retired)

        opening = self._opening[geometry, layout] = self._opener.submit(task)
        opening.add_done_callback(lambda _: self._done())


def config_of_pool(config: Config, geometry: KVGeometry, layout: Layout) -> Config:
    """What a pool may take: its part of DRAM and of the disk, where it has a directory of its own."""
    storage, parts = config.storage, config.node.pools
    disk = storage.disk
    if disk.path is not None:
        disk = disk.model_copy(update={"path": disk.path / directory_of(geometry, layout), "size": disk.size // parts})
    cpu = storage.cpu.model_copy(update={"size": storage.cpu.size // parts})
    return config.model_copy(update={"storage": storage.model_copy(update={"cpu": cpu, "disk": disk})})


def directory_of(geometry: KVGeometry, layout: Layout = CANONICAL) -> str:
    """A name for a geometry that people can read, and for a layout what tells it from others."""
    g = geometry
    name = f"{g.layers}x{g.planes}x{g.block_tokens}x{g.kv_heads}x{g.head_dim}-{g.dtype}"
    return name if layout == CANONICAL else f"{name}-{layout.digest().hex()}"
