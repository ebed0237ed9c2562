"""Instances that register in the cluster are followed, those that leave are dropped."""

import asyncio

from cairn.cluster import Directory, Events, Instance, Keys, MemoryRegistry, Registration
from cairn.cluster.directory import Joined, Left, Member
from cairn.fleet.discovery import Discovery
from cairn.fleet.instances import Instance as Publishing
from cairn.fleet.metrics import Resync
from cairn.fleet.subscriber import Subscriber
from tests.fleet.holder import Holder
from tests.fleet.peers import LIMITS, Publisher, until


def registered(*publishers: Publisher, incarnation: str = "1") -> Instance:
    """One instance whose data-parallel ranks are the publishers."""
    events = tuple(Events(endpoint=one.endpoint, replay=one.replay, rank=one.source.rank) for one in publishers)
    return Instance(name="a", incarnation=incarnation, http="http://127.0.0.1:1", events=events)


def test_an_instance_is_followed_from_its_join_to_its_leaving() -> None:
    with Publisher(rank=0) as first, Publisher(rank=1) as second:
        first.publish()
        second.publish()
        holder = Holder()

        def holds(*publishers: Publisher) -> bool:
            return all(holder.hashes(one.source) == one.state() for one in publishers)

        def gone(publisher: Publisher) -> bool:
            """Ranks are dropped one after the other, so that one may still be held where one is left."""
            return not holder.hashes(publisher.source)

        async def main() -> None:
            async with (
                MemoryRegistry() as registry,
                Directory(registry, Keys()) as directory,
                Subscriber(holder, limits=LIMITS) as subscriber,
                Discovery(directory, subscriber),
            ):
                key = Keys().instance("a")
                async with Registration(registry, key, registered(first, second), 30) as registration:
                    await until(lambda: holds(first, second), "the blocks of both ranks")
                    first.publish()
                    await until(lambda: holds(first), "a live block")
                    # Another set of ranks: the one that is left out is dropped.
                    await registration.update(registered(first))
                    await until(lambda: len(subscriber.states()) == 1 and gone(second) and holds(first), "one rank")
                await until(lambda: holder.hashes(first.source) == set(), "the drop")
                assert subscriber.states() == []
                # A restart without a leaving between: the name is taken by another incarnation.
                old = Registration(registry, key, registered(first, second, incarnation="2"), 30)
                await old.open()
                await until(lambda: holds(first, second), "the return")
                drops = subscriber.metrics.fleet_drops.value(reason=Resync.REMOVED)
                await Registration(registry, key, registered(first, incarnation="3"), 30).open()
                await until(lambda: len(subscriber.states()) == 1 and gone(second) and holds(first), "the successor")
                assert subscriber.metrics.fleet_drops.value(reason=Resync.REMOVED) == drops + 2
                await old.close()

        asyncio.run(main())


def test_an_endpoint_that_cannot_be_used_leaves_the_others() -> None:
    with Publisher() as publisher:
        publisher.publish()
        holder = Holder()

        async def main() -> None:
            async with (
                MemoryRegistry() as registry,
                Directory(registry, Keys()) as directory,
                Subscriber(holder, limits=LIMITS) as subscriber,
                Discovery(directory, subscriber),
            ):
                bad = Instance(name="b", incarnation="1", http="http://x:1", events=(Events(endpoint="nonsense"),))
                await Registration(registry, Keys().instance("b"), bad, 30).open()
                async with Registration(registry, Keys().instance("a"), registered(publisher), 30):
                    await until(lambda: holder.hashes(publisher.source) == publisher.state(), "the blocks")

        asyncio.run(main())


def test_whoever_follows_publishers_is_told() -> None:
    class Told:
        """A follower that takes its time."""

        def __init__(self) -> None:
            self.calls: list[Publishing | str] = []

        async def add(self, instance: Publishing) -> None:
            await asyncio.sleep(0)
            self.calls.append(instance)

        async def remove(self, name: str) -> None:
            await asyncio.sleep(0)
            self.calls.append(name)

    async def main() -> None:
        told = Told()
        events = (Events(endpoint="tcp://x:1", replay="tcp://x:2"), Events(endpoint="tcp://x:3", rank=1))
        instance = Instance(name="a", incarnation="1", http="http://x:1", model="m", events=events)
        async with (
            MemoryRegistry() as registry,
            Directory(registry, Keys()) as directory,
            Discovery(directory, told),
        ):
            async with Registration(registry, Keys().instance("a"), instance, 30):
                await until(lambda: len(told.calls) == 2, "both ranks")
            await until(lambda: len(told.calls) == 3, "the leaving")
        ranks = [
            Publishing("a", "tcp://x:1", "tcp://x:2", rank=0, model="m"),
            Publishing("a", "tcp://x:3", rank=1, model="m"),
        ]
        assert told.calls == [*ranks, "a"]

    asyncio.run(main())


def test_a_follower_that_is_late_is_told_again() -> None:
    """As after the process was stopped for longer than whoever asks waits: nothing is lost, and in order."""
    one = Instance(name="a", incarnation="1", http="http://127.0.0.1:1", events=(Events(endpoint="tcp://h:1"),))

    class Late:
        """Answers every second call."""

        def __init__(self) -> None:
            self.calls: list[str] = []
            self.done = asyncio.Event()

        async def add(self, instance: Publishing) -> None:
            self._called("add")

        async def remove(self, name: str) -> None:
            self._called("remove")
            self.done.set()

        def _called(self, what: str) -> None:
            self.calls.append(what)
            if len(self.calls) % 2:
                raise TimeoutError

    async def main() -> None:
        async with MemoryRegistry() as registry, Directory(registry, Keys()) as directory:
            late = Late()
            async with Discovery(directory, late) as discovery:
                discovery._hear(Joined(Member(one)))
                discovery._hear(Left(Member(one)))
                async with asyncio.timeout(30):
                    await late.done.wait()
            assert late.calls == ["add", "add", "remove", "remove"]

    asyncio.run(main())
