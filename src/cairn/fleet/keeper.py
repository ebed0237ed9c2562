"""Writes snapshots of a followed fleet, now and then, beside everything else that the event loop does."""

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cairn.errors import StorageError
from cairn.fleet.index import FleetIndex
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.snapshot import Positions, StoppedError, Written, write_snapshot
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: How often a thread that waits for the event loop looks whether it is still wanted, seconds.
_LOOK_S: Final = 0.2


class SnapshotKeeper:
    """Snapshots of an index that a `Subscriber` feeds. For its event loop; a thread does the writing.

    `asyncio.create_task(SnapshotKeeper(index, subscriber.position, path, subscriber.metrics).run(60.0))`
    """

    def __init__(self, index: FleetIndex, positions: Positions, path: Path, metrics: FleetMetrics) -> None:
        self._index, self._positions, self._path, self._metrics = index, positions, path, metrics
        self._turn = asyncio.Lock()

    async def run(self, interval_s: float) -> None:
        """Writes one every so often, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await self.write()

    async def write(self) -> Written | None:
        """Writes one; None: it could not be written, which is counted, and the one before stands."""
        async with self._turn:
            stop = threading.Event()
            at = in_loop(asyncio.get_running_loop(), stop)
            try:
                written = await asyncio.to_thread(
                    write_snapshot, self._index, self._path, self._positions, at=at, stop=stop
                )
            except StorageError as error:
                self._metrics.fleet_snapshots.add(1, outcome="failed")
                log_once(logger, f"snapshot {self._path}", f"snapshot not written: {error}")
                return None
            finally:
                stop.set()
            self._metrics.fleet_snapshots.add(1, outcome="written")
            return written


def in_loop(loop: asyncio.AbstractEventLoop, stop: threading.Event) -> Callable[[Callable[[], bool]], bool]:
    """Calls in the event loop's thread, for another thread, which waits; until `stop` is set. The calls raise
    StoppedError then.
    """

    def at(call: Callable[[], bool]) -> bool:
        future: concurrent.futures.Future[bool] = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
                    raise

        try:
            loop.call_soon_threadsafe(run)
        except RuntimeError:  # closed
            raise StoppedError from None
        while True:
            try:
                return future.result(_LOOK_S)
            except concurrent.futures.TimeoutError:
                if stop.is_set() and future.cancel():
                    raise StoppedError from None

    return at
