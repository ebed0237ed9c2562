"""A candidate in a process of its own: `candidate.py ENDPOINT FOLDER NAME`. As leader it writes a line of a log
that all candidates share, and says on stdout what became of it: [fence, when it believed to lead, applied].
"""

import asyncio
import json
import sys
import time

from cairn.cluster.base import Put
from cairn.cluster.election import Election, Leadership
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.errors import ClusterError

TTL_S = 2.0


def say(claim: list[object]) -> None:
    sys.stdout.write(json.dumps(claim) + "\n")
    sys.stdout.flush()


async def write(registry: EtcdRegistry, folder: str, leadership: Leadership) -> None:
    held_at = time.monotonic() if leadership.held() else None
    line = json.dumps([leadership.fence, held_at]).encode()
    try:
        outcome = await registry.transact([leadership.guard], [Put(f"{folder}log", line)])
    except ClusterError:
        return
    say([leadership.fence, held_at, outcome.applied])


async def main(endpoint: str, folder: str, name: str) -> None:
    async with EtcdRegistry(EtcdSettings(endpoints=(endpoint,))) as registry:
        election = Election(registry, f"{folder}election/", name, TTL_S)
        say([])
        while True:
            leadership = await election.lead()
            while leadership.held():
                await write(registry, folder, leadership)
                await asyncio.sleep(0.005)
            await write(registry, folder, leadership)  # it does not believe to lead any more: only the guard is left
            await leadership.resign()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
