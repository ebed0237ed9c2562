"""Counters of a tier, by name."""

import threading
from collections import Counter
from concurrent.futures import Future
from typing import Final

from cairn.observe.reasons import TIERS_REASONS, Reason
from cairn.tier.base import Outcomes

_TRAFFIC: Final = ("read_blocks", "read_bytes", "written_blocks", "written_bytes", "dropped_blocks")


class Tally:
    """Counters by name, those of every reason of tiers and of every kind of traffic from zero on. Thread-safe."""

    def __init__(self) -> None:
        self._counts = Counter({f"{reason}_total": 0 for reason in TIERS_REASONS} | dict.fromkeys(_TRAFFIC, 0))
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def refused(self, blocks: int, reason: Reason) -> "Future[Outcomes]":
        """A batch of which nothing is begun: counted, and settled at once."""
        self.add(**{f"{reason}_total": blocks})
        future: Future[Outcomes] = Future()
        future.set_result([reason] * blocks)
        return future
