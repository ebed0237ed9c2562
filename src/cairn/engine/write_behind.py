"""Write-behind: what is committed in DRAM goes to the disk in the background, within a bounded share of the arena."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from cairn.kv import Keys
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Tier
from cairn.tier.dram import DramTier

#: How long one background write may take before what has not started is given up.
WRITE_TIMEOUT_S = 30.0


class WriteBehind:
    """Copies DRAM blocks to a lower tier without anyone waiting. Rows are pinned from `offer` until they are written.

    At most `limit_blocks` wait at any time; what exceeds them is skipped and counted (the block stays in DRAM and is
    offered again when it is next stored). Thread-safe.
    """

    def __init__(self, dram: DramTier, lower: Tier, *, limit_blocks: int, block_tokens: int, metrics: Metrics) -> None:
        self._dram = dram
        self._lower = lower
        self._limit = limit_blocks
        self._block_tokens = block_tokens
        self._metrics = metrics
        self._pending = 0
        self._cancel = threading.Event()
        self._changed = threading.Condition()

    @property
    def pending(self) -> int:
        """Blocks that wait or are being written."""
        return self._pending

    def offer(self, keys: Keys, namespace: bytes) -> None:
        """Writes the blocks of a chain that DRAM holds and the lower tier does not. Returns at once."""
        first = self._lower.match(keys)
        if first == len(keys):
            return
        with self._changed:
            room = max(0, self._limit - self._pending)
            wanted = min(len(keys) - first, room)
            self._pending += wanted
        self._skip(len(keys) - first - wanted, Reason.BACKPRESSURE)
        ids = self._dram.index.pin(keys[first : first + wanted], use=False)
        if len(ids) < wanted:
            self._finish(wanted - len(ids))
        if len(ids):
            deadline = time.monotonic() + WRITE_TIMEOUT_S
            future = self._lower.write(
                keys, first, self._dram.rows(ids), namespace=namespace, deadline=deadline, cancel=self._cancel
            )
            started = time.monotonic()
            future.add_done_callback(lambda done: self._written(done, ids, started))

    def drain(self, timeout: float) -> bool:
        """Waits until nothing is pending; False if the timeout came first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending == 0, timeout)

    def stop(self) -> None:
        """What has not started is given up."""
        self._cancel.set()

    def _written(self, done: "Future[Outcomes]", ids: npt.NDArray[np.int32], started: float) -> None:
        self._dram.index.unpin(ids)
        outcomes = done.result()
        for reason in outcomes:
            if reason is not None:
                self._skip(1, reason)
        written = sum(reason is None for reason in outcomes)
        size = written * self._dram.block_bytes
        self._metrics.transferred(self._lower.name, "store", size, time.monotonic() - started)
        if written:
            self._metrics.stored_tokens.add(written * self._block_tokens, tier=self._lower.name)
        self._finish(len(ids))

    def _skip(self, blocks: int, reason: Reason) -> None:
        if blocks:
            self._metrics.skipped_tokens.add(blocks * self._block_tokens, tier=self._lower.name, reason=reason)

    def _finish(self, blocks: int) -> None:
        with self._changed:
            self._pending -= blocks
            self._changed.notify_all()
