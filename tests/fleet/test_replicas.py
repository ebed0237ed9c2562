"""Several replicas of the index, real publishers with short buffers, and a real valkey-server between them."""

import asyncio
import random
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cairn.errors import InputError, StorageError
from cairn.fleet import FleetIndex, Source
from cairn.fleet.metrics import FleetMetrics, Resync, WarmStarted
from cairn.fleet.replica import Replica
from cairn.fleet.shared_store import CHUNK, CopyReader, FencedError, SharedStore, place_of
from cairn.fleet.subscriber import Subscriber
from tests.fleet.peers import LIMITS, Publisher, until
from tests.fleet.test_warm_start import held
from tests.fleet.valkey_server import Server
from tests.fleet.wire_events import removed

QUICK = {"interval_s": 0.1, "timeout_s": 0.3}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as started:
        yield started


class Member:
    """A replica, its index, and what it counts."""

    def __init__(self, url: str, **options: float) -> None:
        self.index, self.metrics = FleetIndex(1 << 10), FleetMetrics()
        self.replica = Replica(self.index, url, self.metrics, **QUICK | options)

    def rounds(self, outcome: str) -> float:
        return self.metrics.fleet_shared_rounds.value(outcome=outcome)

    def drops(self) -> float:
        return self.metrics.fleet_drops.value()


@asynccontextmanager
async def member(url: str, *publishers: Publisher, **options: float) -> AsyncIterator[Member]:
    made = Member(url, **options)
    made.warm = await made.replica.read()  # type: ignore[attr-defined]
    instances = [one.instance for one in publishers]
    async with Subscriber(
        made.index,
        instances,
        limits=LIMITS,
        metrics=made.metrics,
        warm=made.warm,  # type: ignore[attr-defined]
    ) as subscriber:
        task = asyncio.create_task(made.replica.run(subscriber.position))
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.wait([task])
            await made.replica.close()


async def agree(publisher: Publisher, *members: Member) -> None:
    for one in members:
        await until(lambda one=one: held(one.index, publisher.source) == publisher.state(), "agreement")


async def written_from_now_on(one: Member) -> None:
    rounds = one.rounds("leads")
    await until(lambda: one.rounds("leads") >= rounds + 2, "a copy")


async def say(publisher: Publisher, rng: random.Random, *members: Member) -> None:
    """Random events, no faster than the replicas follow: the buffer is short."""
    for _ in range(8):
        made = sorted(publisher.state())
        if made and rng.random() < 0.3:
            publisher.publish(removed(rng.sample(made, 1)))
        elif publisher.made < 38:
            publisher.publish()
        await agree(publisher, *members)


def test_replicas_agree_whoever_starts_when(server: Server) -> None:
    """Two batches is all that the publisher still has: the rest a newcomer has from the copies."""
    rng = random.Random(1)
    with Publisher("a", buffer=2) as one, Publisher("b", buffer=2, rank=1) as other:

        async def run() -> None:
            async with member(server.url, one, other) as first:
                assert first.warm.outcome is WarmStarted.ABSENT  # type: ignore[attr-defined]
                for publisher in (one, other):
                    publisher.publish()
                    await agree(publisher, first)
                    await say(publisher, rng, first)
                await written_from_now_on(first)
                async with member(server.url, one, other) as second:
                    assert second.warm.sources == 2  # type: ignore[attr-defined]
                    await say(one, rng, first, second)
                    await written_from_now_on(first)
                    async with member(server.url, one, other) as third:
                        for publisher in (one, other):
                            await say(publisher, rng, first, second, third)
                        assert second.rounds("leads") == 0
                        assert [each.drops() for each in (first, second)] == [0, 0]

        asyncio.run(run())


def test_who_holds_the_lease_is_killed(server: Server) -> None:
    with Publisher("a", buffer=2) as publisher:
        publisher.publish()
        command = [sys.executable, str(Path(__file__).with_name("replica_process.py")), server.url]
        leader = subprocess.Popen([*command, *publisher.instance[:3]], stdout=subprocess.PIPE)
        assert leader.stdout is not None
        try:
            assert select.select([leader.stdout], [], [], 60)[0], "no copy from the leader"

            async def run() -> None:
                async with member(server.url, publisher) as second:
                    assert second.warm.sources == 1  # type: ignore[attr-defined]
                    await agree(publisher, second)
                    await until(lambda: second.rounds("follows") > 0, "the other's lease")
                    assert second.rounds("leads") == 0
                    leader.kill()
                    await say(publisher, random.Random(2), second)
                    await written_from_now_on(second)
                    async with member(server.url, publisher) as third:
                        await agree(publisher, second, third)
                        await say(publisher, random.Random(3), second, third)
                    assert second.drops() == 0

            asyncio.run(run())
        finally:
            leader.kill()
            leader.wait(20)
            leader.stdout.close()


def test_a_server_that_comes_back_empty(server: Server) -> None:
    with Publisher("a", buffer=2) as publisher:

        async def run() -> None:
            async with member(server.url, publisher) as first:
                publisher.publish()
                await agree(publisher, first)
                await written_from_now_on(first)
                server.kill()
                await until(lambda: first.rounds("failed") > 0, "the failure")
                await say(publisher, random.Random(4), first)
                async with member(server.url, publisher) as cold:
                    assert cold.warm.outcome is WarmStarted.UNREADABLE  # type: ignore[attr-defined]
                    publisher.publish()
                    await until(lambda: publisher.made in held(cold.index, publisher.source), "what comes from now on")
                    assert held(cold.index, publisher.source) <= publisher.state()
                server.start()
                await written_from_now_on(first)
                async with member(server.url, publisher) as second:
                    assert second.warm.sources == 1  # type: ignore[attr-defined]
                    await say(publisher, random.Random(5), first, second)
                assert first.drops() == 0

        asyncio.run(run())


def test_a_server_that_hangs_stops_nobody(server: Server) -> None:
    with Publisher("a") as publisher:

        async def run() -> None:
            async with member(server.url, publisher, timeout_s=2.0) as first:
                publisher.publish()
                await agree(publisher, first)
                await written_from_now_on(first)
                server.pause()
                try:
                    longest = 0.0
                    while first.rounds("failed") < 1:
                        start = time.monotonic()
                        if publisher.made < 35:
                            publisher.publish()
                        await agree(publisher, first)
                        await asyncio.sleep(0.02)  # there are few blocks to tell of
                        longest = max(longest, time.monotonic() - start)
                    assert longest < 1.0  # what an answer may take is twice that
                    start = time.monotonic()
                    assert (await Member(server.url).replica.read()).outcome is WarmStarted.UNREADABLE
                    assert time.monotonic() - start < 5
                finally:
                    server.go_on()
                await written_from_now_on(first)

        asyncio.run(run())


def test_another_process_in_place_of_the_copy_s(server: Server) -> None:
    with Publisher("a") as publisher:

        async def run() -> None:
            async with member(server.url, publisher) as first:
                publisher.publish()
                await agree(publisher, first)
                await written_from_now_on(first)
            publisher.kill()
            publisher.start()
            publisher.publish()
            async with member(server.url, publisher) as second:
                assert second.warm.sources == 1  # type: ignore[attr-defined]
                await agree(publisher, second)
                assert second.metrics.fleet_drops.value(reason=Resync.RESTART) == 1

        asyncio.run(run())


def store(server: Server, **options: Any) -> SharedStore:
    return SharedStore(server.url, "f", **{"timeout_s": 1.0, "lease_s": 60.0, "keep_s": 60.0} | options)


def copies(one: SharedStore) -> list[bytes]:
    return [CopyReader(one, key, chunks, time.monotonic() + 9).read(1 << 30) for key, chunks in one.entries()]


def test_who_has_lost_the_lease_publishes_nothing(server: Server) -> None:
    one, other, data = store(server), store(server), bytes(range(256)) * (CHUNK // 128) + b"end"
    assert one.lead()
    assert not other.lead()
    assert one.lead()
    writer = one.write(Source("a", 0))
    writer.write(data)
    writer.publish()
    late = one.write(Source("a", 0))
    late.write(b"late" * CHUNK)
    server.client().delete("{cairn:f}:lease")  # it has expired
    assert other.lead()
    with pytest.raises(FencedError):
        late.publish()
    with pytest.raises(FencedError):
        one.write(Source("b", 0)).write(bytes(CHUNK))
    one.resign()  # of what is not ours
    assert not one.lead()
    assert copies(other) == [data]
    newer = other.write(Source("a", 0))
    newer.write(b"newer")
    newer.publish()
    assert copies(one) == [b"newer"]
    other.resign()
    assert one.lead()


def test_copies_that_are_gone_are_struck_off(server: Server) -> None:
    one = store(server)
    assert one.lead()
    for name in "ab":
        writer = one.write(Source(name, 0))
        writer.write(name.encode())
        writer.publish()
    gone, _ = one.entries()[0]
    server.client().delete(gone)
    assert len(copies(one)) == 2
    assert b"" in copies(one)
    one.prune()
    assert len(copies(one)) == 1
    assert all(server.client().ttl(key) > 0 for key in server.client().scan_iter() if not key.endswith(b":token"))


def test_an_entry_that_is_none_is_replaced_like_others(server: Server) -> None:
    one, client = store(server), server.client()
    assert one.lead()
    writer = one.write(Source("a", 0))
    writer.write(b"first")
    writer.publish()
    (source,) = client.hkeys("{cairn:f}:sources")
    client.hset("{cairn:f}:sources", source, b"no entry")
    assert one.entries() == []
    writer = one.write(Source("a", 0))
    writer.write(b"second")
    writer.publish()
    assert copies(one) == [b"second"]


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "huge"])
def test_copies_that_are_damaged_are_not_taken_in(server: Server, harm: str) -> None:
    with Publisher("a") as publisher, Publisher("b") as well:

        async def run() -> None:
            async with member(server.url, publisher, well) as first:
                for one in (publisher, well):
                    one.publish()
                    await agree(one, first)
                await written_from_now_on(first)
            client = server.client()
            key, _ = store_of(server.url).entries()[0]
            chunk = client.hget(key, 0)
            assert isinstance(chunk, bytes)
            middle = len(chunk) // 2
            changed = {
                "flip": chunk[:middle] + bytes([chunk[middle] ^ 1]) + chunk[middle + 1 :],
                "cut": chunk[:middle],
                "huge": bytes(CHUNK + 1),
            }
            client.hdel(key, 0) if harm == "gone" else client.hset(key, 0, changed[harm])
            newcomer = Member(server.url)
            warm = await newcomer.replica.read()
            assert (warm.sources, len(newcomer.index.sources())) == (1, 1)

        asyncio.run(run())


def store_of(url: str) -> SharedStore:
    return SharedStore(url, "default", timeout_s=1.0, lease_s=1.0, keep_s=1.0)


def test_secrets_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert place_of("valkeys://user:hunter2@host:1/2") == "valkeys://host:1/2"
    assert "hunter2" not in place_of("valkeys://:1/hunter2@host")
    with pytest.raises(InputError) as raised:
        SharedStore("http://user:hunter2@host", "f", timeout_s=1.0, lease_s=1.0, keep_s=1.0)
    assert "hunter2" not in str(raised.value)
    with Server(tmp_path, "--requirepass", "hunter2", password="hunter2") as server:
        for password, outcome in (("hunter2", WarmStarted.ABSENT), ("wrong-hunter2", WarmStarted.UNREADABLE)):
            made = Member(f"unix://:{password}@{server.socket}")
            assert asyncio.run(made.replica.read()).outcome is outcome
        with pytest.raises(StorageError) as failed:
            SharedStore(f"unix://:wrong-hunter2@{server.socket}", "f", timeout_s=1.0, lease_s=1.0, keep_s=1.0).lead()
    assert "hunter2" not in str(failed.value) + caplog.text
