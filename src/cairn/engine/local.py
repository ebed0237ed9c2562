"""The embedded store: DRAM and the tiers below it, in the inference process itself."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from cairn.codec.ladder import ladder_for
from cairn.config import Config
from cairn.engine.base import BlockStore, Held
from cairn.engine.hold import LocalHold
from cairn.engine.write_behind import WriteBehind
from cairn.engine.writing import LocalWriting, Writing
from cairn.errors import CairnError
from cairn.index import POLICIES
from cairn.index.journal import Journal
from cairn.kv import Keys, KVGeometry, Layout
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel
from cairn.tier.arena import Arena
from cairn.tier.base import Rows, Tier
from cairn.tier.disk import DiskTier
from cairn.tier.dram import DramTier
from cairn.tier.known import ABSENT_S, HANDOVER_ABSENT_S
from cairn.tier.remote import open_remote

#: Bytes that one read brings up: large enough for the disk's full speed, small enough that copying starts early.
PROMOTION_BYTES = 16 << 20


class Writes(NamedTuple):
    """How a lower tier is written. share: of DRAM that may be pinned for it at a time, 0: it is only read. linger_s,
    lazy: see `WriteBehind`.
    """

    share: float
    linger_s: float = 0.0
    lazy: bool = False


#: Whether a tier, by its name, is given so many tokens (the last) behind so many others.
Worth = Callable[[str, int, int], bool]


class LocalStore(BlockStore):
    """Owns its tiers and closes them. lower: the tiers below DRAM from the fastest on, and how they are written."""

    def __init__(
        self,
        geometry: KVGeometry,
        dram: DramTier,
        lower: Sequence[tuple[Tier, Writes]],
        *,
        metrics: Metrics,
        cost: CostModel,
        worth: Worth,
        sync_interval_s: float,
    ) -> None:
        self.memory = dram.memory
        self.asks = any(type(tier).ask is not Tier.ask for tier, _ in lower)
        self._geometry = geometry
        self.dram = dram
        self._lower = [tier for tier, _ in lower]
        self._metrics = metrics
        self._cost = cost
        self._worth = worth
        self._closed = threading.Event()
        metrics.watch(dram.name, dram.stats)
        self._writers = [self._writer(tier, writes) for tier, writes in lower]
        for tier, writer in zip(self._lower, self._writers, strict=True):
            metrics.watch(tier.name, partial(_figures, tier, writer))
        self._syncer = threading.Thread(target=self._sync_always, args=(sync_interval_s,), daemon=True)
        if lower:
            self._syncer.start()

    def match(self, keys: Keys) -> Held:
        dram = upto = self.dram.index.match(keys)
        below = []
        for tier in self._lower:
            if upto < len(keys):
                upto = max(upto, tier.match(keys))
            below.append((tier.name, upto))
        return Held(dram, tuple(below))

    def ask(self, keys: Keys, *, deadline: float, worth_s: float) -> "Future[None] | None":
        if self.match(keys).total == len(keys):
            return None
        answers = [tier.ask(keys, deadline=deadline, worth_s=worth_s) for tier in self._lower]
        return _all([answer for answer in answers if answer is not None])

    def hold(self, keys: Keys, *, deadline: float, use: bool = True) -> LocalHold:
        """use: whether it counts as a use of the blocks now; else the caller says so by `used`, once he has time."""
        resident = self.dram.index.pin(keys, use=use)
        hold = LocalHold(self.dram.index, keys, resident, self._landed, self.memory)
        upto = len(resident)
        for tier in self._lower:
            if use:
                tier.touch(keys)
            below = tier.match(keys) if upto < len(keys) else 0
            if below > upto:
                upto = self._promote(hold, tier, upto, below, deadline)
        if upto > len(resident):
            hold.start()
        return hold

    def used(self, keys: Keys) -> None:
        """Counts a use of a chain's blocks in every tier."""
        self.dram.index.touch(keys)
        for tier in self._lower:
            tier.touch(keys)

    def write(self, keys: Keys, *, namespace: bytes) -> Writing:
        index = self.dram.index
        writing = LocalWriting(index, keys, lambda upto, new: self._committed(keys[:upto], new, namespace), self.memory)
        for tier, writer in zip(self._lower, self._writers, strict=True):
            tier.touch(keys)
            # What DRAM had already may have missed its turn to be written when it was stored.
            writer.offer(keys[: writing.first], namespace)
        return writing

    def watch(self) -> dict[str, Journal]:
        tiers = [self.dram.name, *(tier.name for tier in self._lower)]
        return {tier: journal for tier in tiers if (journal := self.journal(tier)) is not None}

    def journal(self, tier: str) -> Journal | None:
        """Another journal of one tier, until its `end`; None where there is no such tier, or others come and go."""
        if tier == self.dram.name:
            return self.dram.index.watch()
        return next((one.watch() for one in self._lower if one.name == tier), None)

    def flush(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        drained = [writer.drain(left()) for writer in self._writers]
        return all(drained) and all(tier.sync(left()) for tier in self._lower)

    def close(self, timeout: float) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        deadline = time.monotonic() + timeout
        for tier, writer in zip(self._lower, self._writers, strict=True):
            writer.drain(max(0.0, deadline - time.monotonic()))
            writer.stop()
            tier.close(max(0.0, deadline - time.monotonic()))
        if self._lower:
            self._syncer.join(timeout)

    def _writer(self, tier: Tier, writes: Writes) -> WriteBehind:
        limit = max(1, int(writes.share * self.dram.index.capacity)) if writes.share else 0
        block = self._geometry.block_tokens
        return WriteBehind(
            self.dram,
            tier,
            limit_blocks=limit,
            block_tokens=block,
            metrics=self._metrics,
            linger_s=writes.linger_s,
            lazy=writes.lazy,
            worth=lambda first, stop: self._worth(tier.name, first * block, (stop - first) * block),
        )

    def _promote(self, hold: LocalHold, tier: Tier, first: int, below: int, deadline: float) -> int:
        """Asks a tier for blocks first..below, batch by batch, each into rows of its own; returns up to where."""
        pack = tier.pack_blocks
        step = max(1, PROMOTION_BYTES // (pack * self._geometry.block_bytes)) * pack
        cancel = hold.prepare()
        while first < below:
            # Batches end where the tier's groups do, so that no group is read in two parts.
            wanted = min(first // pack * pack + step, below) - first
            ids = self.dram.index.reserve(wanted)
            if len(ids):
                future = tier.read(hold.keys, first, Rows(self.memory, ids), deadline=deadline, cancel=cancel)
                hold.expect(tier.name, first, ids, future)
            first += len(ids)
            if len(ids) < wanted:
                hold.stop_short(Reason.NO_SLOT)
                return len(hold.keys)  # nothing beyond it can be had
        return first

    def _committed(self, keys: Keys, new: int, namespace: bytes) -> None:
        if new:
            self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier=self.dram.name)
        for writer in self._writers:
            writer.offer(keys, namespace)

    def _landed(self, tier: str, blocks: int, seconds: float) -> None:
        size = blocks * self._geometry.block_bytes
        self._metrics.transferred(tier, "load", size, seconds)
        self._cost.observe_load(tier, size, seconds)

    def _sync_always(self, interval: float) -> None:
        while not self._closed.wait(interval):
            for tier, writer in zip(self._lower, self._writers, strict=True):
                tier.sync(interval)
                writer.pump()


def _all(answers: "list[Future[None]]") -> "Future[None] | None":
    """Done when all are; None for none."""
    if len(answers) < 2:
        return answers[0] if answers else None
    done: Future[None] = Future()
    left = itertools.count(len(answers) - 1, -1)  # each number is given to one thread

    def count(_: "Future[None]") -> None:
        if next(left) == 0:
            done.set_result(None)

    for answer in answers:
        answer.add_done_callback(count)
    return done


def _figures(tier: Tier, writer: WriteBehind) -> Mapping[str, float]:
    return {**tier.stats(), "write_queue_blocks": writer.waiting_blocks}


def open_local(
    config: Config,
    geometry: KVGeometry,
    layout: Layout,
    metrics: Metrics,
    cost: CostModel,
    arena: Arena | None = None,
    peers: Tier | None = None,
    *,
    canonical: bool = True,
    worth: Worth = lambda _tier, _first, _tokens: True,
) -> LocalStore:
    """The tiers that the configuration asks for, for rows of `layout`; DRAM in `arena` if one is given.

    peers: the tier of other hosts' nodes, if there is one. RDMA is faster than an SSD, TCP is not.

    canonical: whether blocks are bytes of the canonical layout. worth: what is written below DRAM. Raises StorageError
    or ConfigError when the tiers cannot be had, GeometryError or InputError where blocks cannot be compressed as asked.
    """
    storage, share, pins = config.storage, config.engine.write_behind, config.autopilot
    lower: list[tuple[Tier, Writes]] = []
    if peers:
        lower.append((peers, Writes(0.0)))
    try:
        ladder = ladder_for(geometry, config.compression, pins.codec, canonical=canonical)
        if storage.disk.path is not None:
            disk = DiskTier(
                storage.disk.path,
                geometry=geometry,
                layout=layout,
                capacity_bytes=storage.disk.size,
                policy=POLICIES[storage.disk.policy],
                threads=storage.disk.threads,
                write_budget_bytes_per_day=storage.disk.write_budget_per_day,
                lossy=ladder is not None and ladder.lossy,
            )
            place = len(lower) if config.node.peers.protocol == "rdma" else 0
            lower.insert(place, (disk, Writes(share if pins.disk != "never" else 0.0)))
        if storage.remote.url is not None:
            at_once = config.engine.enable_disagg_pd  # somebody waits for what is stored now
            absent_s = HANDOVER_ABSENT_S if at_once else ABSENT_S
            remote = open_remote(storage.remote, geometry, layout, ladder, metrics, absent_s=absent_s)
            may_write = share if storage.remote.write != "off" and pins.remote != "never" else 0.0
            linger_s = 0.0 if at_once else storage.remote.linger_s
            writes = Writes(may_write, linger_s, lazy=storage.remote.write == "back" and not at_once)
            lower.append((remote, writes))
        dram = DramTier(geometry.block_bytes, storage.cpu.size, POLICIES[storage.cpu.policy], arena)
    except CairnError:
        for tier, _ in lower:
            tier.close(0.0)
        raise
    interval = storage.disk.sync_interval_s
    return LocalStore(geometry, dram, lower, metrics=metrics, cost=cost, worth=worth, sync_interval_s=interval)
