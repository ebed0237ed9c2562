"""Loads first: what is stored in the background gets a share of the way to the store while requests wait for loads."""

import threading
import time
from typing import Final

#: A store is not held back for longer than this at a time, so that it always makes some progress.
_LONGEST_S: Final = 2.0


class Share:
    """Holds stores back while loads are under way, to `share` (0..1) of the bytes moved meanwhile.

    With no load under way stores go at full speed. Thread-safe.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._loading = 0
        self._loaded = 0
        self._stored = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self.held_back = 0

    def begin_load(self) -> None:
        with self._lock:
            if not self._loading:
                self._loaded = self._stored = 0
            self._loading += 1

    def end_load(self, size: int) -> None:
        """A load is over that moved `size` bytes."""
        with self._lock:
            self._loading -= 1
            self._loaded += size
            if self._waiting:
                self._changed.notify_all()

    def before_store(self, size: int, deadline: float) -> None:
        """Waits until `size` bytes may be stored, at most until the deadline (monotonic)."""
        with self._lock:
            if not self._may(size):
                self.held_back += 1
                self._waiting += 1
                self._changed.wait_for(lambda: self._may(size), max(0.0, min(_LONGEST_S, deadline - time.monotonic())))
                self._waiting -= 1
            self._stored += size

    def _may(self, size: int) -> bool:
        moved = self._loaded + self._stored + size
        return not self._loading or self._stored + size <= self._share * moved
