"""A circuit breaker: a device that keeps failing is left alone for a while, so that it slows nobody twice.

After Michael Nygard, "Release It!" (2007): closed -> open after failures in a row -> half-open, one probe at a time.
"""

import threading
import time
from collections.abc import Callable


class Breaker:
    """Opens after `threshold` consecutive failures and rests for `cooldown_seconds`, doubling up to `longest_seconds`.

    After the rest one caller may probe: its success closes the breaker, its failure opens it for twice as long. A probe
    that reports nothing for a whole rest is given up, and the next caller may try. Results of operations that were
    begun before the breaker opened count for nothing while it is open. Thread-safe; waits for nothing.
    """

    def __init__(
        self,
        *,
        threshold: int = 3,
        cooldown_seconds: float = 1.0,
        longest_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = threshold
        self._first_rest = cooldown_seconds
        self._longest = longest_seconds
        self._clock = clock
        self._failures = 0
        self._rest = cooldown_seconds
        self._retry_at: float | None = None  # None: closed
        self._probing = False
        self._lock = threading.Lock()
        #: How often it has opened from closed.
        self.opened = 0

    @property
    def closed(self) -> bool:
        return self._retry_at is None

    def ready(self) -> bool:
        """Whether `allow` would say yes; takes nothing."""
        retry_at = self._retry_at
        return retry_at is None or self._clock() >= retry_at

    def allow(self) -> bool:
        """Whether to try now. Once the rest is over, True for one caller: its operation is the probe."""
        with self._lock:
            if self._retry_at is None:
                return True
            now = self._clock()
            if now < self._retry_at:
                return False
            self._probing = True
            self._retry_at = now + self._rest
            return True

    def success(self) -> None:
        """An operation went well."""
        if self._retry_at is None and not self._failures:
            return  # nearly always, and then without the lock
        with self._lock:
            if self._retry_at is None:
                self._failures = 0
            elif self._probing:
                self._retry_at, self._probing = None, False
                self._failures, self._rest = 0, self._first_rest

    def failure(self) -> None:
        """An operation failed or took far too long."""
        with self._lock:
            if self._retry_at is None:
                self._failures += 1
                if self._failures >= self._threshold:
                    self._retry_at = self._clock() + self._rest
                    self.opened += 1
            elif self._probing:
                self._probing = False
                self._rest = min(2 * self._rest, self._longest)
                self._retry_at = self._clock() + self._rest
