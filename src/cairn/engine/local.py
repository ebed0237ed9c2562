"""The embedded store: DRAM and, if asked for, a disk tier, in the inference process itself."""

import threading
import time

from cairn.config import Config
from cairn.engine.base import BlockStore, Held
from cairn.engine.hold import Hold
from cairn.engine.write_behind import WriteBehind
from cairn.engine.writing import Writing
from cairn.index import POLICIES
from cairn.kv import Keys, KVGeometry
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel
from cairn.tier.base import Rows, Tier
from cairn.tier.disk import DiskTier
from cairn.tier.dram import DramTier

#: Bytes that one read brings up: large enough for the disk's full speed, small enough that copying starts early.
PROMOTION_BYTES = 16 << 20


class LocalStore(BlockStore):
    """Owns its tiers and closes them. `lower` may be None: then DRAM is all there is."""

    def __init__(
        self,
        geometry: KVGeometry,
        dram: DramTier,
        lower: Tier | None,
        *,
        metrics: Metrics,
        cost: CostModel,
        write_behind: float,
        sync_interval_s: float,
    ) -> None:
        self.memory = dram.memory
        self._geometry = geometry
        self._dram = dram
        self._lower = lower
        self._metrics = metrics
        self._cost = cost
        self._writer: WriteBehind | None = None
        self._closed = threading.Event()
        metrics.watch(dram.name, dram.stats)
        if lower:
            metrics.watch(lower.name, lower.stats)
            limit = max(1, int(write_behind * dram.index.capacity)) if write_behind else 0
            self._writer = WriteBehind(
                dram, lower, limit_blocks=limit, block_tokens=geometry.block_tokens, metrics=metrics
            )
            self._syncer = threading.Thread(target=self._sync_always, args=(sync_interval_s,), daemon=True)
            self._syncer.start()

    def match(self, keys: Keys) -> Held:
        dram = self._dram.index.match(keys)
        below = self._lower.match(keys) if self._lower and dram < len(keys) else 0
        return Held(dram, max(dram, below))

    def hold(self, keys: Keys, *, deadline: float) -> Hold:
        resident = self._dram.index.pin(keys)
        hold = Hold(self._dram.index, keys, resident, self._landed)
        if self._lower:
            self._lower.touch(keys)
            below = self._lower.match(keys) if len(resident) < len(keys) else 0
            self._promote(hold, below, deadline)
        hold.start()
        return hold

    def write(self, keys: Keys, *, namespace: bytes) -> Writing:
        writing = Writing(self._dram.index, keys, lambda upto, new: self._committed(keys[:upto], new, namespace))
        if self._lower:
            self._lower.touch(keys)
        if self._writer:
            # What DRAM had already may have missed its turn to be written when it was stored.
            self._writer.offer(keys[: writing.first], namespace)
        return writing

    def flush(self, timeout: float) -> bool:
        if not self._writer or not self._lower:
            return True
        deadline = time.monotonic() + timeout
        return self._writer.drain(timeout) and self._lower.sync(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        deadline = time.monotonic() + timeout
        if self._writer and self._lower:
            self._writer.drain(timeout)
            self._writer.stop()
            self._lower.close(max(0.0, deadline - time.monotonic()))
            self._syncer.join(timeout)

    def _promote(self, hold: Hold, below: int, deadline: float) -> None:
        """Asks the lower tier for blocks resident..below, batch by batch, each into rows of its own."""
        assert self._lower is not None
        step = max(1, PROMOTION_BYTES // self._geometry.block_bytes)
        first = hold.resident
        while first < below:
            wanted = min(step, below - first)
            ids = self._dram.index.reserve(wanted)
            if len(ids):
                future = self._lower.read(
                    hold.keys, first, Rows(self.memory, ids), deadline=deadline, cancel=hold.cancel
                )
                hold.expect(first, ids, future)
            if len(ids) < wanted:
                hold.stop_short(Reason.NO_SLOT)
                return
            first += wanted

    def _committed(self, keys: Keys, new: int, namespace: bytes) -> None:
        if new:
            self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier=self._dram.name)
        if self._writer:
            self._writer.offer(keys, namespace)

    def _landed(self, blocks: int, seconds: float) -> None:
        assert self._lower is not None
        size = blocks * self._geometry.block_bytes
        self._metrics.transferred(self._lower.name, "load", size, seconds)
        self._cost.observe_load(self._lower.name, size, seconds)

    def _sync_always(self, interval: float) -> None:
        assert self._lower is not None
        while not self._closed.wait(interval):
            self._lower.sync(interval)


def open_local(config: Config, geometry: KVGeometry, metrics: Metrics, cost: CostModel) -> LocalStore:
    """The tiers that the configuration asks for. Raises StorageError or ConfigError when they cannot be had."""
    storage = config.storage
    lower: Tier | None = None
    if storage.disk.path is not None:
        lower = DiskTier(
            storage.disk.path,
            geometry=geometry,
            capacity_bytes=storage.disk.size,
            policy=POLICIES[storage.disk.policy],
            threads=storage.disk.threads,
            write_budget_bytes_per_day=storage.disk.write_budget_per_day,
        )
    return LocalStore(
        geometry,
        DramTier(geometry.block_bytes, storage.cpu.size, POLICIES[storage.cpu.policy]),
        lower,
        metrics=metrics,
        cost=cost,
        write_behind=config.engine.write_behind,
        sync_interval_s=storage.disk.sync_interval_s,
    )
