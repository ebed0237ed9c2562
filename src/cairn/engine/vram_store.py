"""The node's store with VRAM before it: this process's own, and that of the host's other GPU processes."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.config import Config
from cairn.copy import Copier, PagedKV, RowMemory, TokenSlots
from cairn.engine.base import Held
from cairn.engine.hold import Run
from cairn.engine.node_store import NodeHold, NodeStore, NodeWriting
from cairn.engine.vram import SharedVram, Source
from cairn.engine.vram_behind import VramBehind
from cairn.errors import ConfigError, StorageError
from cairn.kv import Keys, KVGeometry, Layout
from cairn.node import wire
from cairn.node.base import Memory
from cairn.node.client import Link
from cairn.node.wire import MAX_BLOCKS, MAX_DONATED, raw_of, rows_of
from cairn.observe.log import log_once
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel
from cairn.tier.arena import PAGE
from cairn.tier.dram import round_up
from cairn.tier.vram import Device, open_device

log = logging.getLogger(__name__)


class VramRows(NamedTuple):
    """Blocks first..stop of a chain are these rows of a source."""

    first: int
    stop: int
    rows: npt.NDArray[np.int32]
    source: Source


class VramHold(NodeHold):
    """Leading blocks in VRAM, and behind them what the node holds elsewhere."""

    def __init__(
        self,
        keys: Keys,
        link: Link,
        numbers: tuple[int, int],
        landed: Callable[[str, int, float], None],
        lead: list[VramRows],
    ) -> None:
        """numbers: of the hold in DRAM, and of that in VRAM."""
        super().__init__(keys, link, numbers[0], landed)
        self.lead = lead
        self.ready = lead[-1].stop
        self._settled = self.ready == len(keys)
        self._session = link
        self._in_vram = numbers[1]

    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]:
        end = self.lead[-1].stop
        found = {"vram": max(0, min(stop, end) - start)}
        return found | super().blocks_by_tier(max(start, end), max(stop, end))

    def run(self, block: int) -> Run:
        part = self._part(block)
        return Run("vram", part.stop) if part else super().run(block)

    def scatter(
        self, copier: Copier, kv: PagedKV, slots: TokenSlots, blocks: range, layers: range | None = None
    ) -> bool:
        part = self._part(blocks.start)
        if part is None:
            return super().scatter(copier, kv, slots, blocks, layers)
        rows = part.rows[blocks.start - part.first : blocks.stop - part.first]
        try:
            with self._session.passage() as inside, part.source.using() as memory:
                if inside is None:
                    self.stop_short(Reason.NODE_AWAY)
                    return False
                if memory is not None:
                    copier.scatter(kv, slots, memory, rows, layers)
                if memory is None or not part.source.sound():
                    self.stop_short(Reason.OWNER_GONE)
                    return False
        except StorageError as error:
            log_once(log, "scatter", f"a copy from VRAM failed: {error}")
            self.stop_short(Reason.IO_ERROR)
            return False
        return True

    def release(self) -> None:
        super().release()
        self._session.end(self._in_vram)

    def _part(self, block: int) -> VramRows | None:
        return next((part for part in self.lead if block < part.stop), None)


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


class VramStore(NodeStore):
    """Searches the own segment, then peers' segments, then what the node holds. What is written goes to the own segment
    at once, and from there to DRAM, and so to the tiers below, in the background (`VramBehind`). A prompt that the own
    segment cannot take as a whole goes to DRAM.
    """

    def __init__(
        self, address: str, geometry: KVGeometry, vram: SharedVram, copier: Copier, device: Device, **settings: Any
    ) -> None:
        """settings: as for `NodeStore`. Owns `vram`, and what `copier` has registered."""
        self._vram = vram
        self._copier = copier
        self._arena: Memory | None = None
        self._pinning = ThreadPoolExecutor(1, "cairn-vram-pin")
        self._behind = VramBehind(self, copier, geometry, device.index, settings["metrics"])
        try:
            super().__init__(address, geometry, **settings)
        except BaseException:
            self._behind.stop()
            self._pinning.shutdown()
            raise

    def match(self, keys: Keys) -> Held:
        link = self._link()
        if link is None or not len(keys):
            return Held(0, own=0)
        reply = link.call(wire.Match(self._client.number(), link.welcome.session, raw_of(keys[:MAX_BLOCKS])))
        if not isinstance(reply, wire.Matched):
            return Held(0, own=0)
        return Held(reply.dram, tuple(reply.below), reply.vram, reply.own)

    def hold(self, keys: Keys, *, deadline: float) -> NodeHold:
        link = self._link()
        if link is None or not len(keys):
            return super().hold(keys, deadline=deadline)
        found = self.hold_vram(keys, link)
        if found is None:
            return super().hold(keys, deadline=deadline)
        if not found.settled:
            self._take(found, link, keys, deadline)
        return found

    def hold_vram(self, keys: Keys, link: Link | None = None) -> VramHold | None:
        """Pins the leading blocks that are in VRAM and can be reached; None if there are none."""
        link = link or self._link()
        if link is None:
            return None
        in_dram, in_vram = self._client.number(), self._client.number()
        reply = link.call(wire.TakeVram(in_vram, link.welcome.session, in_vram, raw_of(keys[:MAX_BLOCKS])))
        lead: list[VramRows] = []
        for part in reply.parts if isinstance(reply, wire.TakenVram) else ():
            source, rows = self._vram.source(link, part), rows_of(part.rows)
            if source is None:
                break
            first = lead[-1].stop if lead else 0
            lead.append(VramRows(first, first + len(rows), rows, source))
        if lead:
            return VramHold(keys, link, (in_dram, in_vram), self._landed, lead)
        link.end(in_vram)
        return None

    def write(self, keys: Keys, *, namespace: bytes) -> NodeWriting:
        link = self._link()
        source = self._vram.donated(link) if link else None
        if link is None or source is None:
            return super().write(keys, namespace=namespace)
        number = self._client.number()
        reply = link.call(wire.ReserveVram(number, link.welcome.session, number, raw_of(keys[:MAX_BLOCKS])))
        if isinstance(reply, wire.Reserved) and reply.first + len(reply.rows) // 4 == len(keys):
            if not reply.rows:
                self._behind.offer(keys, namespace)  # it may have missed its turn when it was stored
            return VramWriting(link, number, reply, source, partial(self._written, keys, namespace))
        link.end(number)
        return super().write(keys, namespace=namespace)

    def write_dram(self, keys: Keys, *, namespace: bytes) -> NodeWriting:
        """Rows for the blocks that DRAM lacks, whatever VRAM has."""
        return super().write(keys, namespace=namespace)

    def flush(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        drained = self._behind.drain(timeout)
        return super().flush(max(0.0, deadline - monotonic())) and drained

    def close(self, timeout: float) -> None:
        """What is in VRAM alone goes to DRAM, as far as `timeout` allows; then the segment is taken back."""
        deadline = monotonic() + timeout
        self._behind.drain(timeout)
        self._behind.stop()
        self._vram.close(self._link(), max(0.0, deadline - monotonic()))
        super().close(timeout)
        self._pinning.shutdown(wait=True)

    def _linked(self, link: Link) -> None:
        super()._linked(link)
        self._metrics.watch("vram", partial(self._figures_of, "vram"))
        self._pinning.submit(self._pin, link.memory)

    def _pin(self, arena: Memory) -> None:
        """Has copies from and to this arena made fast; half a second a GiB on CUDA, and until then they are slow."""
        if arena is self._arena:
            return
        try:
            if self._arena is not None:
                self._copier.release(self._arena)
            self._copier.register(arena)
            self._arena = arena
        except StorageError as error:
            log_once(log, "pin", f"the node's arena cannot be pinned: {error}")

    def _written(self, keys: Keys, namespace: bytes, upto: int, new: int) -> None:
        if new:
            self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier="vram")
        self._behind.offer(keys[:upto], namespace)


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
    stride = round_up(geometry.block_bytes, PAGE)
    slots = min(config.storage.vram.size // stride, MAX_DONATED)
    if slots < 1:
        raise ConfigError(
            f"storage.vram.size={config.storage.vram.size}: must hold at least one KV block of {stride} bytes, or be 0"
        )
    device = open_device(config.storage.vram.device)
    copier = device.copier(geometry, config.engine.copy_threads)
    vram = SharedVram(device, slots, stride)
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
