"""Rows lent to other hosts' nodes: pinned for a while, and told with checksums."""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from cairn.errors import StorageError
from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.node.base import Memory
from cairn.node.pools import Pool, directory_of
from cairn.node.wire import raw_of
from cairn.observe.log import log_once
from cairn.tier.arena import Arena
from cairn.tier.dram import DramTier
from cairn.tier.peer.wire import Lent, sum_of
from cairn.transport import Transport

log = logging.getLogger(__name__)

#: One in so many of a pool's rows may be lent at a time, so that peers cannot keep its own clients from storing.
_SHARE: Final = 4


class _Lease(NamedTuple):
    dram: DramTier
    rows: SlotIds
    until: float


class Lending:
    """What peers may read of a node's pools (`pools` tells those there are now). Thread-safe.

    A lease ends when it is given back or its time is over, whoever still reads: then the rows may be written anew, and
    the reader's checksums tell. Arenas are served read-only where the transport is guarded.
    """

    def __init__(self, transport: Transport, pools: Callable[[], Iterable[Pool]]) -> None:
        self._transport = transport
        self._pools = pools
        self._leases: dict[int, _Lease] = {}
        self._numbers = itertools.count(secrets.randbits(40) << 20)
        self._served: dict[str, Memory] = {}
        self._lock = threading.Lock()
        self._lent_blocks = 0

    def find(self, pool: str, keys: Keys) -> int:
        """How many leading blocks of a chain the pool's DRAM holds."""
        found = self._pool(pool)
        return found.store.dram.index.match(keys) if found else 0

    def lend(self, pool: str, keys: Keys, seconds: float) -> Lent:
        """Pins the leading ones of these blocks for `seconds`. Raises StorageError where they cannot be served."""
        found = self._pool(pool)
        if found is None:
            return Lent(0, self._transport.endpoint, 0, 0, b"", b"")
        memory, dram = self._serve(found), found.store.dram
        with self._lock:
            lent = sum(len(lease.rows) for lease in self._leases.values() if lease.dram is dram)
            rows = dram.index.pin(keys[: max(0, dram.index.capacity // _SHARE - lent)], use=False)
            number = next(self._numbers)
            self._leases[number] = _Lease(dram, rows, time.monotonic() + seconds)
            self._lent_blocks += len(rows)
        sums = b"".join(sum_of(key, memory[row, : dram.block_bytes]) for key, row in zip(keys, rows, strict=False))
        return Lent(number, self._transport.endpoint, memory.ctypes.data, found.stride, bytes(raw_of(rows)), sums)

    def give_back(self, number: int) -> None:
        with self._lock:
            lease = self._leases.pop(number, None)
        if lease:
            lease.dram.index.unpin(lease.rows)

    def tidy(self) -> None:
        """Ends leases whose time is over; serves the arenas of pools that have come, and no more of those gone."""
        now = time.monotonic()
        with self._lock:
            over = [number for number, lease in self._leases.items() if now > lease.until]
        for number in over:
            self.give_back(number)
        pools = list(self._pools())
        with self._lock:
            for name in self._served.keys() - {pool.arena for pool in pools}:
                self._transport.withdraw(self._served.pop(name))
        for pool in pools:
            try:
                self._serve(pool)
            except StorageError as error:
                log_once(log, f"serve {pool.arena}", f"peers cannot read {pool.arena}: {error}")

    def close(self) -> None:
        """Ends all leases, and serves nothing any more."""
        for number in list(self._leases):
            self.give_back(number)
        with self._lock:
            while self._served:
                self._transport.withdraw(self._served.popitem()[1])

    def figures(self) -> dict[str, float]:
        return {"leases": len(self._leases), "lent_blocks_total": self._lent_blocks}

    def _pool(self, name: str) -> Pool | None:
        return next((pool for pool in self._pools() if directory_of(*pool.kind) == name), None)

    def _serve(self, pool: Pool) -> Memory:
        with self._lock:
            memory = self._served.get(pool.arena)
            if memory is None:
                memory = pool.store.dram.memory
                if self._transport.guarded:
                    memory = Arena.attach(pool.arena, *memory.shape, writable=False).memory
                self._transport.serve(memory)
                self._served[pool.arena] = memory
            return memory
