"""Write-behind: what is committed in DRAM goes to the tier below in the background, and nobody waits for it."""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.kv import Keys
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Tier
from cairn.tier.dram import DramTier

#: How long one background write may take before what has not started is given up.
WRITE_TIMEOUT_S = 30.0


class _Waiting(NamedTuple):
    """A chain of which something is still to be written."""

    keys: Keys
    namespace: bytes
    missing: int


class WriteBehind:
    """Copies DRAM blocks to a lower tier, oldest offer first.

    Only what is being written is pinned, at most `limit_blocks`; what waits is a list of keys, at most as many as DRAM
    has slots. A block that DRAM evicts before its turn is skipped, and so is an offer beyond that bound: both are
    counted, and offered again when they are next stored. Thread-safe.
    """

    def __init__(self, dram: DramTier, lower: Tier, *, limit_blocks: int, block_tokens: int, metrics: Metrics) -> None:
        self._dram = dram
        self._lower = lower
        self._limit = limit_blocks
        self._block_tokens = block_tokens
        self._metrics = metrics
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self._waiting_blocks = 0
        self._writing = 0
        self._pumping = False
        self._cancel = threading.Event()
        self._changed = threading.Condition()

    def offer(self, keys: Keys, namespace: bytes) -> None:
        """Writes the blocks of a chain that DRAM holds and the lower tier does not. Returns at once."""
        missing = len(keys) - self._lower.match(keys)
        if not missing:
            return
        tip = keys[-1].tobytes()
        with self._changed:
            if tip in self._waiting or not self._limit or self._cancel.is_set():
                return
            if self._waiting_blocks + missing > self._dram.index.capacity:
                self._skip(missing, Reason.BACKPRESSURE)
                return
            # A copy: the caller's array grows with its request.
            self._waiting[tip] = _Waiting(keys.copy(), namespace, missing)
            self._waiting_blocks += missing
        self._pump()

    def drain(self, timeout: float) -> bool:
        """Waits until nothing waits or is being written; False if the timeout came first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def stop(self) -> None:
        """What has not started is given up."""
        self._cancel.set()
        with self._changed:
            self._waiting.clear()
            self._waiting_blocks = 0
            self._changed.notify_all()

    def _pump(self) -> None:
        """Starts as many writes as the limit allows; one thread at a time does, the others' work is found by its
        loop.
        """
        with self._changed:
            if self._pumping:
                return
            self._pumping = True
        while True:
            with self._changed:
                room = self._limit - self._writing
                if room <= 0 or not self._waiting:
                    self._pumping = False
                    return
                _, chain = self._waiting.popitem(last=False)
                self._waiting_blocks -= chain.missing
                first = self._lower.match(chain.keys)
                wanted = min(len(chain.keys) - first, room)
                ids = self._dram.index.pin(chain.keys[first : first + wanted], use=False)
                self._writing += len(ids)
                self._changed.notify_all()
            if len(ids) < wanted:
                self._skip(len(chain.keys) - first - len(ids), Reason.EVICTED)
            if len(ids):
                self._write(chain, first, ids)

    def _write(self, chain: _Waiting, first: int, ids: npt.NDArray[np.int32]) -> None:
        started = time.monotonic()
        future = self._lower.write(
            chain.keys,
            first,
            self._dram.rows(ids),
            namespace=chain.namespace,
            deadline=started + WRITE_TIMEOUT_S,
            cancel=self._cancel,
        )
        future.add_done_callback(lambda done: self._written(done, chain, first, ids, started))

    def _written(
        self, done: "Future[Outcomes]", chain: _Waiting, first: int, ids: npt.NDArray[np.int32], started: float
    ) -> None:
        self._dram.index.unpin(ids)
        outcomes: Outcomes = [Reason.IO_ERROR] * len(ids) if done.exception() else done.result()
        written = sum(reason is None for reason in outcomes)
        for reason in {reason for reason in outcomes if reason is not None}:
            self._skip(outcomes.count(reason), reason)
        self._metrics.transferred(
            self._lower.name, "store", written * self._dram.block_bytes, time.monotonic() - started
        )
        if written:
            self._metrics.stored_tokens.add(written * self._block_tokens, tier=self._lower.name)
        if written == len(ids) and first + len(ids) < len(chain.keys):
            # The tier takes a chain's blocks in order: the rest of it waits for another turn.
            self.offer(chain.keys, chain.namespace)
        with self._changed:
            self._writing -= len(ids)
            self._changed.notify_all()
        self._pump()

    def _skip(self, blocks: int, reason: Reason) -> None:
        self._metrics.skipped_tokens.add(blocks * self._block_tokens, tier=self._lower.name, reason=reason)
