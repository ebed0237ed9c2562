"""A replica of the index in a process of its own. Arguments: the server's URL; an instance's name, endpoint, replay.

Prints a line when it has written copies.
"""

import asyncio
import sys

from cairn.fleet import FleetIndex
from cairn.fleet.instances import Instance
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.replica import Replica
from cairn.fleet.subscriber import Subscriber


async def main(url: str, *instance: str) -> None:
    index, metrics = FleetIndex(1 << 10), FleetMetrics()
    replica = Replica(index, url, metrics, interval_s=0.1, timeout_s=0.3)
    warm = await replica.read()
    async with Subscriber(index, [Instance(*instance)], metrics=metrics, warm=warm) as subscriber:
        running = asyncio.create_task(replica.run(subscriber.position))
        while not running.done():
            if metrics.fleet_shared_rounds.value(outcome="leads") > 1 and index.sources():
                sys.stdout.write("leads\n")
                sys.stdout.flush()
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
