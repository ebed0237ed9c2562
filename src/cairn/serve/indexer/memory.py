"""What the service remembers across its own end: a snapshot on disk, and copies that replicas share in Valkey."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from cairn.config.schema import Index
from cairn.fleet import FleetIndex
from cairn.fleet.keeper import SnapshotKeeper
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.positions import WarmStart
from cairn.fleet.replica import Replica
from cairn.fleet.snapshot import Positions, read_snapshot

#: Of the time that the service's end may take, what the last snapshot has.
_LAST_SHARE: Final = 0.4


class Memory:
    """Both, either or none, as configured. For the event loop that follows events."""

    def __init__(self, config: Index, index: FleetIndex, metrics: FleetMetrics) -> None:
        """Raises InputError for a URL that names no Valkey."""
        self._index, self._metrics = index, metrics
        self._path, self._interval_s = config.snapshot, config.snapshot_interval_s
        self._last_s = _LAST_SHARE * config.shutdown_s
        self._replica: Replica | None = None
        if config.shared is not None:
            url = config.shared.get_secret_value()
            self._replica = Replica(index, url, metrics, fleet=config.fleet, interval_s=config.shared_interval_s)

    @property
    def remembers(self) -> bool:
        """Whether there is either."""
        return self._path is not None or self._replica is not None

    async def read(self) -> WarmStart | None:
        """What there is to begin with: the copies, which are younger, or else the snapshot. The index must be empty."""
        warm = None
        if self._replica is not None:
            warm = await self._replica.read()
        if self._path is not None and (warm is None or not warm.sources):
            warm = await asyncio.to_thread(read_snapshot, self._path, self._index, metrics=self._metrics)
        return warm

    @asynccontextmanager
    async def kept(self, positions: Positions) -> AsyncIterator[None]:
        """Writes now and then, and the snapshot once more at the end."""
        keeper = SnapshotKeeper(self._index, positions, self._path, self._metrics) if self._path is not None else None
        tasks = [asyncio.create_task(keeper.run(self._interval_s))] if keeper else []
        if self._replica is not None:
            tasks.append(asyncio.create_task(self._replica.run(positions)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._last_s):
                    if keeper is not None:
                        await keeper.write()
                    if self._replica is not None:
                        await self._replica.close()
