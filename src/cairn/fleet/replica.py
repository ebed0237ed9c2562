"""One of several replicas of the index: shares through Valkey what a replica that starts cannot get from publishers.

Each replica follows all publishers itself, so neither lookups nor events wait for Valkey, and replicas agree because
they hear the same. What a newcomer lacks is what was published before the publishers' buffers begin; that it takes from
copies of the sources, each with its position, which one replica at a time writes. From there on it is a warm start:
a source counts once its publisher has proved, byte for byte, to be the one that the copy is of.
"""

import asyncio
import logging
import random
import threading
import time
from contextlib import suppress

from cairn.errors import StorageError
from cairn.fleet.base import Source
from cairn.fleet.index import FleetIndex
from cairn.fleet.keeper import in_loop
from cairn.fleet.metrics import FleetMetrics, WarmStarted
from cairn.fleet.positions import Position, WarmStart
from cairn.fleet.shared_store import CopyReader, FencedError, SharedStore
from cairn.fleet.snapshot import At, Positions, StoppedError, read_sources, rehearse, write_sources
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)


class Replica:
    """Reads copies once, then writes them now and then if it holds the lease. For one event loop.

    replica = Replica(index, "valkey://127.0.0.1:6379/0", metrics)
    warm = await replica.read()
    async with Subscriber(index, instances, metrics=metrics, warm=warm) as subscriber:
        task = asyncio.create_task(replica.run(subscriber.position))
    """

    def __init__(
        self,
        index: FleetIndex,
        url: str,
        metrics: FleetMetrics,
        *,
        fleet: str = "default",
        interval_s: float = 30.0,
        timeout_s: float = 2.0,
    ) -> None:
        """fleet: replicas of one name share; all follow the same instances. interval_s: between two copies of a source;
        shorter than what publishers' buffers reach back. timeout_s: for an answer of the server. Raises InputError.
        """
        rehearse()
        self._index, self._metrics, self._interval_s = index, metrics, interval_s
        lease_s, keep_s = max(3 * interval_s, 3 * timeout_s), max(600.0, 20 * interval_s)
        self._store = SharedStore(url, fleet, timeout_s=timeout_s, lease_s=lease_s, keep_s=keep_s)
        self._jitter = random.Random()

    async def read(self, deadline_s: float = 30.0) -> WarmStart:
        """What the copies hold, held back until proved, in an index that holds nothing. Never raises: without Valkey,
        or without copies, it is a cold start, counted and logged.
        """
        return await asyncio.to_thread(self._read, time.monotonic() + deadline_s)

    async def run(self, positions: Positions) -> None:
        """Writes copies until cancelled. Valkey's failures are counted; nothing else depends on it."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        at = in_loop(loop, stop)
        try:
            while True:
                # Not in step with the other replicas, nor all at once when the server comes back.
                await asyncio.sleep(self._interval_s * self._jitter.uniform(0.7, 1.3))
                self._metrics.fleet_shared_rounds.add(
                    1, outcome=await asyncio.to_thread(self._round, positions, at, stop)
                )
        finally:
            stop.set()

    async def close(self) -> None:
        """Gives up the lease; after `run` has ended. Repeatable."""
        await asyncio.to_thread(self._resign)

    def _resign(self) -> None:
        with suppress(StorageError):  # it expires
            self._store.resign()
        self._store.close()

    def _round(self, positions: Positions, at: At, stop: threading.Event) -> str:
        """Copies of all sources, if the lease is ours; how that ended."""
        try:
            if not self._store.lead():
                return "follows"
            for source in self._index.sources():
                self._write(source, positions, at, stop)
            self._store.prune()
        except FencedError:
            return "fenced"
        except StoppedError:
            return "stopped"
        except StorageError as error:
            log_once(logger, f"shared store {self._store.where}", f"copies not written: {error}")
            return "failed"
        return "leads"

    def _write(self, source: Source, positions: Positions, at: At, stop: threading.Event) -> None:
        writer = self._store.write(source)
        if write_sources(self._index, (source,), writer.write, positions, at=at, stop=stop)[0]:
            writer.publish()

    def _read(self, deadline: float) -> WarmStart:
        stands: dict[Source, Position] = {}
        blocks, outcome = 0, WarmStarted.ABSENT
        try:
            for key, chunks in self._store.entries():
                warm = read_sources(CopyReader(self._store, key, chunks, deadline).read, self._index, hold_back=True)
                outcome = warm.outcome if outcome is not WarmStarted.WARM else outcome
                stands |= warm.stands
                blocks += warm.worker_blocks
        except StorageError as error:
            log_once(logger, f"shared store {self._store.where}", f"copies not read: {error}")
            outcome = WarmStarted.WARM if stands else WarmStarted.UNREADABLE
        self._metrics.fleet_warm_starts.add(1, outcome=outcome)
        logger.info("%s: %s start, %d sources, %d blocks of theirs", self._store.where, outcome, len(stands), blocks)
        return WarmStart(self._index, outcome, stands, blocks)
