"""Leases: what somebody holds without working on it is taken back when its time is up."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable


class Leases:
    """Calls `expired` of every lease that was not ended in time, from one daemon thread. Thread-safe."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._live: dict[int, Callable[[], None]] = {}
        self._order: list[tuple[float, int]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self, seconds: float, expired: Callable[[], None]) -> int:
        """A lease that ends in `seconds`; returns its id, 0 after `stop`: then there is none."""
        with self._changed:
            if self._stopped:
                return 0
            lease = next(self._ids)
            self._live[lease] = expired
            heapq.heappush(self._order, (time.monotonic() + seconds, lease))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="cairn-leases", daemon=True)
                self._thread.start()
            self._changed.notify()
            return lease

    def end(self, lease: int) -> bool:
        """Ends a lease; False if it had run out, so that what it held is gone."""
        with self._changed:
            return self._live.pop(lease, None) is not None

    def stop(self) -> None:
        """Ends all leases, calling `expired` for each."""
        with self._changed:
            self._stopped = True
            left = list(self._live.values())
            self._live.clear()
            self._changed.notify()
        for expired in left:
            expired()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._stopped:
                    return
                now = time.monotonic()
                if not self._order or self._order[0][0] > now:
                    self._changed.wait(self._order[0][0] - now if self._order else None)
                    continue
                expired = self._live.pop(heapq.heappop(self._order)[1], None)
            if expired:
                expired()
