"""The node's store with VRAM before it: this process's own, and that of the host's other GPU processes."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.config import Config
from cairn.copy import Copier, RowMemory
from cairn.engine.base import Held
from cairn.engine.hold import Hold
from cairn.engine.node_store import NodeWriting
from cairn.engine.vram import SharedVram, Source, open_segment
from cairn.engine.vram_behind import VramBehind
from cairn.engine.vram_pool import VramHold, VramReader, VramRows
from cairn.errors import StorageError
from cairn.kv import Keys, KVGeometry, Layout
from cairn.node import wire
from cairn.node.base import Memory
from cairn.node.client import Link
from cairn.observe.log import log_once
from cairn.observe.metrics import Metrics
from cairn.plan import CostModel
from cairn.tier.vram import Device

log = logging.getLogger(__name__)


class VramWriting(NodeWriting):
    """A write into this process's own segment."""

    tier = "vram"

    def __init__(
        self, link: Link, number: int, reply: wire.Reserved, source: Source, committed: Callable[[int, int], None]
    ) -> None:
        """committed: told (how many leading blocks of the chain are published, how many of them are new)."""
        super().__init__(link, number, reply, lambda new: committed(self.first + self._done, new))
        self.home = None
        self._source = source

    @contextmanager
    def access(self) -> Iterator[RowMemory | None]:
        if self._link is None:
            yield None
            return
        with self._link.passage() as inside, self._source.using() as memory:
            yield None if inside is None else memory


class VramStore(VramReader):
    """What is written goes to the own segment at once, and from there to DRAM, and so to the tiers below, in the
    background (`VramBehind`). A prompt that the own segment cannot take as a whole goes to DRAM.
    """

    def __init__(
        self, address: str, geometry: KVGeometry, vram: SharedVram, copier: Copier, device: Device, **settings: Any
    ) -> None:
        """settings: as for `NodeStore`. Owns `vram`, and what `copier` has registered."""
        self._vram = vram
        self._copier = copier
        self._arena: Memory | None = None
        self._pinning = ThreadPoolExecutor(1, "cairn-vram-pin")
        self._pinned: Future[None] | None = None
        self._closing = False
        self._behind = VramBehind(self, copier, geometry, device.index, settings["metrics"])
        try:
            super().__init__(address, geometry, **settings)
        except BaseException:
            self._behind.stop()
            self._pinning.shutdown()
            raise

    def find(self, keys: Keys, *, briefly: bool = False) -> tuple[Held, Hold | None]:
        link = self._link()
        lead = self._noted(link, keys) if link and briefly else []
        if link is None or not lead:
            return super().find(keys)
        own = lead[0].source
        held = Held(0, own=lead[0].stop if own and own.own else 0, vram=len(keys))
        return held, VramHold(keys, link, None, self._landed, lead)

    def write(self, keys: Keys, *, namespace: bytes) -> NodeWriting:
        link = self._link()
        source = self._vram.donated(link) if link else None
        reserved = self._reserve_vram(keys, link) if link and source else None
        if link is None or source is None or reserved is None:
            return super().write(keys, namespace=namespace)
        if not reserved[1].rows:
            self._behind.offer(keys, namespace)  # it may have missed its turn when it was stored
        return VramWriting(link, *reserved, source, partial(self._written, keys, namespace))

    def write_dram(self, keys: Keys, *, namespace: bytes) -> NodeWriting:
        """Rows for the blocks that DRAM lacks, whatever VRAM has."""
        return super().write(keys, namespace=namespace)

    def flush(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        drained = self._behind.drain(timeout)
        return super().flush(max(0.0, deadline - monotonic())) and drained

    def close(self, timeout: float) -> None:
        """What is in VRAM alone goes to DRAM, as far as `timeout` allows; then the segment is taken back. A pinning
        that takes longer ends by itself.
        """
        deadline = monotonic() + timeout
        self._behind.drain(timeout)
        self._behind.stop()
        self._vram.close(self._link(), max(0.0, deadline - monotonic()))
        super().close(timeout)
        self._closing = True
        self._pinning.shutdown(wait=False, cancel_futures=True)
        if self._pinned:
            wait([self._pinned], max(0.0, deadline - monotonic()))

    def _noted(self, link: Link, keys: Keys) -> list[VramRows]:
        """Where all of a chain is in segments that are mapped, unpinned and without a question; none if it is not, or
        if somebody follows what is asked for.
        """
        if self._journals:
            return []
        sources = self._vram.sources(link)
        whole = [source for source in sources if source.index.has(keys) and source.sound()]
        if not whole:
            return []
        lead: list[VramRows] = []
        upto = 0
        for source in (*(one for one in sources if one.own), min(whole, key=_busy)):
            noted = source.index.note(keys[upto:])
            if len(noted.rows):
                upto, first = upto + len(noted.rows), upto
                lead.append(VramRows(first, upto, noted.rows, source, noted=noted))
        return lead if upto == len(keys) else []

    def _found(self, link: Link, part: wire.VramPart, first: int, rows: npt.NDArray[np.int32]) -> VramRows | None:
        source = self._vram.source(link, part)
        return VramRows(first, first + len(rows), rows, source) if source else None

    def _linked(self, link: Link) -> None:
        super()._linked(link)
        self._pinned = self._pinning.submit(self._pin, link.memory)

    def _pin(self, arena: Memory) -> None:
        """Has copies from and to this arena made fast; half a second a GiB on CUDA, and until then they are slow."""
        if arena is self._arena:
            return
        try:
            if self._arena is not None:
                self._copier.release(self._arena)
            self._copier.register(arena)
            self._arena = arena
            if self._closing:
                self._copier.release(arena)  # whoever closed it did not wait for this
        except StorageError as error:
            log_once(log, "pin", f"the node's arena cannot be pinned: {error}")

    def _written(self, keys: Keys, namespace: bytes, upto: int, new: int) -> None:
        if new:
            self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier="vram")
        self._behind.offer(keys[:upto], namespace)


def _busy(source: Source) -> tuple[bool, int]:
    """What is read last: a peer's, and where others read."""
    return not source.own, source.readers


def open_vram_store(
    address: str,
    config: Config,
    geometry: KVGeometry,
    layout: Layout,
    metrics: Metrics,
    cost: CostModel,
    *,
    canonical: bool,
) -> tuple[VramStore, Copier]:
    """The store of an engine that shares VRAM, and its copier. Raises ConfigError or StorageError."""
    device, vram = open_segment(config, geometry)
    copier = device.copier(geometry, config.engine.copy_threads)
    try:
        return VramStore(
            address,
            geometry,
            vram,
            copier,
            device,
            layout=layout,
            canonical=canonical,
            timeout_s=config.node.timeout_s,
            wait_s=config.engine.timeout_s,
            metrics=metrics,
            cost=cost,
        ), copier
    except BaseException:
        vram.close(None, 0.0)
        copier.close()
        raise
