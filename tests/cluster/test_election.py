"""Leases that are kept, elections, and leaders that are killed or stopped."""

import asyncio
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cairn.cluster.base import Listing, Put, Registry
from cairn.cluster.election import Election
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.cluster.lease import Lease
from cairn.cluster.memory import MemoryRegistry
from tests.cluster.conftest import Body
from tests.cluster.etcd import DEADLINE_S, Cluster

ROOT = Path(__file__).parents[2]


class Candidate:
    def __init__(self, cluster: Cluster, prefix: str, name: str) -> None:
        command = [sys.executable, "-m", "tests.cluster.candidate", cluster.endpoints[0], prefix, name]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        self.said: queue.SimpleQueue[list[float]] = queue.SimpleQueue()
        self.claims: list[list[float]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def claim(self) -> list[float]:
        """The next line of the log that it wrote."""
        self.claims.append(self.said.get(timeout=DEADLINE_S))
        return self.claims[-1]

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self._reader.join(DEADLINE_S)
        while not self.said.empty():
            self.claims.append(self.said.get())
        assert self.process.stdout
        self.process.stdout.close()
        self.process.wait(DEADLINE_S)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.put(json.loads(line))


def test_of_three_candidates_one_leads_whatever_happens_to_it(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd
    candidates = {name: Candidate(cluster, prefix, name) for name in "abc"}

    async def leader(registry: EtcdRegistry, folder: str, besides: str) -> str:
        """Waits for a leader other than `besides`."""
        election = Election(registry, folder, "", 2)
        async with asyncio.timeout(DEADLINE_S), registry.watch(folder, Listing((), 0)) as watch:
            while (found := await election.leader()) in (None, *besides):
                await anext(watch)
            assert found
            return found

    async def main() -> list[str]:
        async with EtcdRegistry(EtcdSettings(endpoints=cluster.endpoints)) as registry:
            log = registry.watch(f"{prefix}log", await registry.range(f"{prefix}log"))
            lines: list[list[float]] = []

            async def read() -> None:
                async for changes in log:
                    lines.extend(json.loads(change.entry.value) for change in changes if change.entry)

            reading = asyncio.ensure_future(read())
            folder = f"{prefix}election/"
            for one in candidates.values():
                assert await asyncio.to_thread(one.said.get, True, DEADLINE_S) == []
            first = await leader(registry, folder, "")
            await asyncio.to_thread(candidates[first].claim)
            candidates[first].process.kill()
            second = await leader(registry, folder, first)
            await asyncio.to_thread(candidates[second].claim)
            candidates[second].process.send_signal(signal.SIGSTOP)
            third = await leader(registry, folder, first + second)
            await asyncio.to_thread(candidates[third].claim)
            candidates[second].process.send_signal(signal.SIGCONT)
            # It wakes within a leadership that is over.
            while (await asyncio.to_thread(candidates[second].claim))[2]:
                pass
            await asyncio.to_thread(candidates[third].claim)
            reading.cancel()
            await asyncio.wait([reading])
        # By the registry: the log's lines are of one leader after the other.
        fences = [line[0] for line in lines]
        assert fences == sorted(fences)
        assert len(set(fences)) == 3
        return [first, second, third]

    try:
        order = asyncio.run(main())
    finally:
        for one in candidates.values():
            one.end()
    # By their own clocks: whoever believed to lead did so before the next one did.
    beliefs = sorted((held_at, fence) for one in candidates.values() for fence, held_at, _ in one.claims if held_at)
    assert [fence for _, fence in beliefs] == sorted(fence for _, fence in beliefs)
    stale = [claim for claim in candidates[order[1]].claims if not claim[2]]
    assert [held_at for _, held_at, _ in stale] == [None] * len(stale)


def test_the_next_leads_when_one_resigns_or_is_cancelled(within: Callable[[Body], None]) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        async def lead(name: str) -> tuple[str, int]:
            leadership = await Election(registry, prefix, name, 30).lead()
            assert leadership.held()
            outcome = await registry.transact([leadership.guard], [Put(f"{prefix}x", b"")])
            assert outcome.applied
            await leadership.resign()
            assert not leadership.held()
            assert not (await registry.transact([leadership.guard], [Put(f"{prefix}x", b"")])).applied
            return name, leadership.fence

        first = await Election(registry, prefix, "first", 30).lead()
        assert await Election(registry, prefix, "", 30).leader() == "first"
        waiting = [asyncio.ensure_future(lead(name)) for name in "abcd"]
        await registry.range(prefix)
        assert not any(one.done() for one in waiting)
        waiting[1].cancel()
        await first.resign()
        done = await asyncio.wait_for(asyncio.gather(*waiting[:1], *waiting[2:]), 10)
        assert {name for name, _ in done} == {"a", "c", "d"}
        assert len({fence for _, fence in done} | {first.fence}) == 4
        assert all(fence > first.fence for _, fence in done)
        assert await Election(registry, prefix, "", 30).leader() is None

    within(body)


def test_a_leader_that_loses_its_lease_learns_of_it() -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry:
            leadership = await Election(registry, "/e/", "a", 0.3).lead()
            entry = await registry.get("/e/leader")
            assert entry
            await registry.revoke(entry.lease)
            other = await Election(registry, "/e/", "b", 30).lead()
            assert other.fence > leadership.fence
            await asyncio.wait_for(leadership.lapse(), 5)
            assert not leadership.held()
            assert other.held()
            await leadership.resign()
            assert await Election(registry, "/e/", "", 30).leader() == "b"
            await other.resign()

    asyncio.run(main())


def test_a_lease_is_held_until_its_time_and_lost_when_the_registry_says_so() -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry:
            lease = await Lease.take(registry, 1.0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lease.lapse(), 1.2)  # it is renewed
            assert lease.held()
            await registry.revoke(lease.id)
            await asyncio.wait_for(lease.lapse(), 5)
            assert not lease.held()
            assert lease.gone.is_set()
            assert registry.metrics.cluster_leases_lost.value() == 1
            await lease.close()
            left = await Lease.take(registry, 0.3)
            await registry.put("/x", b"", left.id)
            await left.close()
            assert await registry.get("/x") is None

    asyncio.run(main())


def test_a_registry_that_is_away_ends_what_is_held_by_its_holders_clock() -> None:
    async def main() -> None:
        registry = MemoryRegistry()
        lease = await Lease.take(registry, 0.3)
        await registry.close()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.wait_for(lease.lapse(), 60)
        assert loop.time() - begun < 10
        assert not lease.gone.is_set()
        await lease.close()

    asyncio.run(main())
