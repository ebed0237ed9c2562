"""Write-behind: what is committed in DRAM goes to the tier below in the background, and nobody waits for it."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.engine.turns import Turns
from cairn.kv import Keys
from cairn.observe.log import log_once
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Tier
from cairn.tier.dram import DramTier

logger = logging.getLogger(__name__)

#: How long one background write may take before what has not started is given up.
WRITE_TIMEOUT_S = 30.0
#: Write-back begins when this share of DRAM's slots is free.
_LAZY_SHARE = 0.25
#: How many blocks longer an offer may be and still take the place of a shorter one.
_GROWTH = 64
#: A chain that is written so many times over is given up: others have taken what was written of it, and would lose as
#: much to it.
_MOST = 2


class _Waiting(NamedTuple):
    """A chain of which something is still to be written, not before `due` (monotonic). turn: of its first offer.
    growing: it has grown since, so what ends it is likely to be replaced soon. spent: how many blocks were written
    for it when it was its turn before.
    """

    keys: Keys
    namespace: bytes
    missing: int
    due: float
    turn: int
    growing: bool = False
    spent: int = 0


class WriteBehind:
    """Copies DRAM blocks to a lower tier, oldest offer first.

    Only what is being written is pinned, at most `limit_blocks`; what waits is a list of keys, at most as many as DRAM
    has slots. A block that DRAM evicts before its turn is skipped, and so is an offer beyond that bound: both are
    counted, and offered again when they are next stored.

    linger_s: an offer waits for so long, and a longer one of the same chain takes its place; of a chain that grows
    meanwhile only whole groups (`Tier.pack_blocks`) are written. lazy (write-back): offers wait until DRAM has few free
    slots left, or somebody drains. worth: whether blocks first..stop of a chain are worth writing, asked when it is
    their turn; what is not is skipped and counted, unless somebody drains. `pump` starts what is due by now.
    Thread-safe.
    """

    def __init__(
        self,
        dram: DramTier,
        lower: Tier,
        *,
        limit_blocks: int,
        block_tokens: int,
        metrics: Metrics,
        linger_s: float = 0.0,
        lazy: bool = False,
        worth: Callable[[int, int], bool] = lambda _first, _stop: True,
    ) -> None:
        self._dram = dram
        self._lower = lower
        self._limit = max(limit_blocks, lower.pack_blocks) if limit_blocks else 0
        self._linger_s = linger_s
        self._lazy = lazy
        self._worth = worth
        self._draining = self._given_up = 0
        self._block_tokens = block_tokens
        self._metrics = metrics
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self._waiting_blocks = 0
        self._writing = 0
        self._turns = Turns()
        self._pumping = False
        self._cancel = threading.Event()
        self._changed = threading.Condition()

    @property
    def waiting_blocks(self) -> int:
        """Blocks that wait to be written."""
        return self._waiting_blocks

    def offer(self, keys: Keys, namespace: bytes) -> None:
        """Writes the blocks of a chain that DRAM holds and the lower tier does not. Returns at once."""
        self._offer(keys, namespace)

    def drain(self, timeout: float) -> bool:
        """Waits until what was offered before is written, or skipped; False if the timeout came first, or `stop`."""
        with self._changed:
            self._draining += 1
            latest, given_up = self._turns.latest, self._given_up
        try:
            self.pump()
            with self._changed:
                over = self._changed.wait_for(lambda: self._turns.over(latest), timeout)
                return over and self._given_up == given_up
        finally:
            with self._changed:
                self._draining -= 1

    def stop(self) -> None:
        """What has not started is given up."""
        self._cancel.set()
        with self._changed:
            self._given_up += len(self._waiting)
            for chain in self._waiting.values():
                self._turns.end(chain.turn)
            self._waiting.clear()
            self._waiting_blocks = 0
            self._changed.notify_all()

    def pump(self) -> None:
        """Starts as many writes as are due and the limit allows; one thread at a time does, the others' work is found
        by its loop.
        """
        with self._changed:
            if self._pumping:
                return
            self._pumping = True
        pack = self._lower.pack_blocks
        while True:
            with self._changed:
                room = (self._limit - self._writing) // pack * pack
                if room <= 0 or not self._due():
                    self._pumping = False
                    return
                _, chain = self._waiting.popitem(last=False)
                self._waiting_blocks -= chain.missing
                chain = self._whole_groups(chain)
                first = min(self._lower.write_start(chain.keys), len(chain.keys))
                if first < len(chain.keys) and not self._draining and not self._worth(first, len(chain.keys)):
                    self._skip(len(chain.keys) - first, Reason.CHEAPER_TO_RECOMPUTE)
                    self._over(chain)
                    continue
                wanted = min(len(chain.keys) - first, room)
                ids = self._dram.index.pin(chain.keys[first : first + wanted], use=False)
                self._writing += len(ids)
                if not len(ids):
                    self._over(chain)
            if len(ids) < wanted:
                self._skip(len(chain.keys) - first - len(ids), Reason.EVICTED)
                chain = chain._replace(keys=chain.keys[: first + len(ids)])  # what has gone waits for no other turn
            if len(ids):
                self._write(chain, first, ids)

    def _offer(self, keys: Keys, namespace: bytes, turn: int | None = None, spent: int = 0) -> None:
        """turn: which it belongs to; None: a new one, or that of the shorter offer whose place it takes. spent: see
        `_Waiting`.
        """
        missing = len(keys) - self._lower.write_start(keys)
        if missing <= 0:
            return
        tip = keys[-1].tobytes()
        with self._changed:
            if not self._limit or self._cancel.is_set():
                return
            same = self._waiting.get(tip)
            if same:
                if turn is not None and turn < same.turn:
                    self._turns.end(same.turn)
                    self._waiting[tip] = same._replace(turn=self._turns.begin(turn))
                return
            shorter = self._shorter(keys) if self._linger_s else None
            due = time.monotonic() + self._linger_s
            if shorter is not None:
                self._waiting_blocks -= shorter.missing
                due = shorter.due
                turn = shorter.turn if turn is None else min(turn, shorter.turn)
            if self._waiting_blocks + missing > self._dram.index.capacity:
                self._skip(missing, Reason.BACKPRESSURE)
            else:
                # A copy: the caller's array grows with its request.
                turn = self._turns.begin(turn)
                self._waiting[tip] = _Waiting(
                    keys.copy(), namespace, missing, due, turn, growing=shorter is not None, spent=spent
                )
                self._waiting_blocks += missing
            if shorter is not None:
                self._over(shorter)
        self.pump()

    def _over(self, chain: _Waiting) -> None:
        """Nothing more is to be done of it, but for what was offered anew. Under the lock."""
        self._turns.end(chain.turn)
        self._changed.notify_all()

    def _due(self) -> bool:
        """Whether the chain that has waited longest may be written now."""
        if not self._waiting:
            return False
        if self._draining:
            return True
        if self._lazy and self._dram.index.occupancy().free > _LAZY_SHARE * self._dram.index.capacity:
            return False
        return next(iter(self._waiting.values())).due <= time.monotonic()

    def _shorter(self, keys: Keys) -> _Waiting | None:
        """Takes out what waits of the beginning of a chain, if there is such an offer of late."""
        for end in range(len(keys) - 1, max(0, len(keys) - _GROWTH), -1):
            found = self._waiting.pop(keys[end - 1].tobytes(), None)
            if found is not None:
                return found
        return None

    def _whole_groups(self, chain: _Waiting) -> _Waiting:
        """The part of a chain that is to be written now; what ends a growing one waits again."""
        whole = len(chain.keys) // self._lower.pack_blocks * self._lower.pack_blocks
        if not chain.growing or self._draining or whole == len(chain.keys):
            return chain
        rest = chain._replace(missing=len(chain.keys) - whole, due=time.monotonic() + self._linger_s, growing=False)
        self._waiting[chain.keys[-1].tobytes()] = rest
        self._turns.begin(rest.turn)
        self._waiting_blocks += rest.missing
        return chain._replace(keys=chain.keys[:whole])

    def _write(self, chain: _Waiting, first: int, ids: npt.NDArray[np.int32]) -> None:
        started = time.monotonic()
        try:
            future = self._lower.write(
                chain.keys,
                first,
                self._dram.rows(ids),
                namespace=chain.namespace,
                deadline=started + WRITE_TIMEOUT_S,
                cancel=self._cancel,
            )
        except Exception as error:  # noqa: BLE001 - such as no thread to be had: counted as a write that failed
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._written(done, chain, first, ids, started))

    def _written(
        self, done: "Future[Outcomes]", chain: _Waiting, first: int, ids: npt.NDArray[np.int32], started: float
    ) -> None:
        self._dram.index.unpin(ids)
        error = done.exception()
        if error:
            log_once(logger, f"write {type(error).__name__}", f"a write to {self._lower.name} failed: {error!r}")
        outcomes: Outcomes = [Reason.IO_ERROR] * len(ids) if error else done.result()
        written = sum(reason is None for reason in outcomes)
        for reason in {reason for reason in outcomes if reason is not None}:
            self._skip(outcomes.count(reason), reason)
        self._metrics.transferred(
            self._lower.name, "store", written * self._dram.block_bytes, time.monotonic() - started
        )
        if written:
            self._metrics.stored_tokens.add(written * self._block_tokens, tier=self._lower.name)
        rest, spent = len(chain.keys) - first - len(ids), chain.spent + len(ids)
        if written == len(ids) and rest and spent < _MOST * len(chain.keys):
            # The tier takes a chain's blocks in order: the rest of it waits for another turn.
            self._offer(chain.keys, chain.namespace, chain.turn, spent)
        elif rest:
            self._skip(rest, Reason.EVICTED if written == len(ids) else Reason.NO_PARENT)
        with self._changed:
            self._writing -= len(ids)
            self._over(chain)
        self.pump()

    def _skip(self, blocks: int, reason: Reason) -> None:
        self._metrics.skipped_tokens.add(blocks * self._block_tokens, tier=self._lower.name, reason=reason)
