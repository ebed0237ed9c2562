"""A lock for which nobody waits twice: a writer that takes it again and again lets every waiting reader in between."""

import threading
from types import TracebackType

import numpy as np


class FairLock:
    """Who waits for the lock holds the gate; who held the lock has to pass the gate again.

    A plain `threading.Lock` goes to whoever asks next, and a thread that has just released it asks before one that
    sleeps has woken up: a reader could wait for as long as there are events.

    waiting [1]: 1 while somebody waits for whoever holds the lock, who may look at it from a kernel, and end early.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self.waiting = np.zeros(1, np.int64)

    def __enter__(self) -> None:
        with self._gate:
            self.waiting[0] = 1
            self._lock.acquire()
            self.waiting[0] = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
