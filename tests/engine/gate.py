"""A real disk tier behind a gate, so that a test decides when a read may go on."""

from concurrent.futures import Future
from threading import Event, Thread
from typing import Any

from cairn.engine import CacheEngine
from cairn.kv import Keys
from cairn.tier.base import Outcomes, Rows
from cairn.tier.disk import DiskTier


class Gate:
    """Reads of the engine's disk wait for `open`; everything else goes straight through."""

    def __init__(self, engine: CacheEngine) -> None:
        self.asked = Event()
        self._opened = Event()
        self._threads: list[Thread] = []
        store: Any = engine._store
        self._disk: DiskTier = store._lower[0]
        self._read = self._disk.read
        self._disk.read = self.read  # type: ignore[method-assign]

    def read(
        self, keys: Keys, first: int, rows: Rows, *, deadline: float, cancel: Event | None = None
    ) -> "Future[Outcomes]":
        future: Future[Outcomes] = Future()

        def later() -> None:
            self._opened.wait(30)
            future.set_result(self._read(keys, first, rows, deadline=deadline + 30, cancel=None).result(30))

        self._threads.append(Thread(target=later, daemon=True))
        self._threads[-1].start()
        self.asked.set()
        return future

    def open(self) -> None:
        """Lets all reads go on and waits until they have landed."""
        self._opened.set()
        for thread in self._threads:
            thread.join(30)
