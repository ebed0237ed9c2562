"""Measures tiers that the planner leaves alone, so that one bad hour does not close a tier for ever."""

import threading
import time
from typing import Final

from cairn.engine.base import BlockStore, Held
from cairn.kv import Keys

#: Seconds between two looks at a tier, and how many bytes one brings up. It moves what a request was just about, so
#: the blocks are not brought up in vain.
INTERVAL_S: Final = 10.0
_BYTES: Final = 32 << 20


class Probes:
    """Brings blocks up from a tier behind the back of a request that computes them anyway; the time it took teaches the
    cost model as any load does. Thread-safe; one at a time.
    """

    def __init__(self, store: BlockStore, block_bytes: int) -> None:
        self._store = store
        self._blocks = max(1, _BYTES // block_bytes)
        self._due: dict[str, float] = {}
        self._under_way = threading.Lock()

    def look(self, keys: Keys, held: Held, deadline: float) -> None:
        """Nothing below DRAM will be loaded of `held`, the leading blocks of `keys`: measures the tier that has what
        comes next, if it is due. Returns at once.
        """
        tier, upto = next(((tier, upto) for tier, upto in held.below if upto > held.dram), ("", 0))
        now = time.monotonic()
        if not tier or now < self._due.get(tier, 0.0) or not self._under_way.acquire(blocking=False):
            return
        self._due[tier] = now + INTERVAL_S
        part = keys[: min(upto, held.dram + self._blocks)].copy()
        thread = threading.Thread(target=self._bring_up, args=(part, deadline), name="cairn-probe", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread to give: the tier is measured another time
            self._under_way.release()

    def _bring_up(self, keys: Keys, deadline: float) -> None:
        try:
            hold = self._store.hold(keys, deadline=deadline)
            try:
                hold.wait(deadline)
            finally:
                hold.release()
        finally:
            self._under_way.release()
