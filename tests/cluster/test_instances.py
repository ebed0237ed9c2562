"""Instances that register and report, and the directory that follows them."""

import asyncio
import time
from collections.abc import Callable

import pytest

from cairn.cluster import (
    CacheState,
    Changed,
    Directory,
    Events,
    Instance,
    Joined,
    Keys,
    Left,
    Load,
    Member,
    MemoryRegistry,
    Registration,
    Registry,
    Replica,
    Replicas,
    Role,
    Shared,
    TierState,
    drain,
    put_setting,
    undrain,
)
from cairn.cluster.base import Entry, Grant
from cairn.cluster.directory import Event
from cairn.cluster.metrics import Unread
from cairn.cluster.values import decode, encode
from cairn.errors import ClusterError, InputError
from tests.cluster.conftest import Body
from tests.cluster.etcd import DEADLINE_S

Within = Callable[[Body], None]


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.002)


def instance(name: str = "a", incarnation: str = "1", **more: object) -> Instance:
    return Instance(name=name, incarnation=incarnation, http="http://10.0.0.1:8000", **more)  # type: ignore[arg-type]


def load(incarnation: str = "1", **more: object) -> Load:
    return Load(incarnation=incarnation, time=1.5, **more)  # type: ignore[arg-type]


def told(events: list[Event]) -> list[tuple[type[Event], str, str]]:
    return [(type(event), event.member.instance.name, event.member.instance.incarnation) for event in events]


FULL = instance(
    role=Role.MIX,
    model="m",
    events=(Events(endpoint="tcp://10.0.0.1:5557", replay="tcp://10.0.0.1:5558"), Events(endpoint="tcp://x:1", rank=1)),
    block_tokens=16,
    capabilities=("cairn",),
    version="0.33.0",
    started=1e9,
)


def test_an_instance_joins_reports_changes_and_leaves(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        events: list[Event] = []
        async with Directory(registry, keys) as directory:
            directory.listen(events.append)
            assert await directory.wait(10)
            async with Registration(registry, keys.instance("a"), FULL, 30) as registration:
                await until(lambda: "a" in directory.members, "the join")
                assert directory.members["a"] == Member(FULL)
                assert await registration.report(keys.instance("a", "load"), load(running=3, ttft_s=0.2))
                cache = CacheState(incarnation="1", time=2.0, tiers=(TierState(tier="remote", used_bytes=5),))
                assert await registration.report(keys.instance("a", "cache"), cache)
                await until(lambda: directory.members["a"].cache == cache, "the reports")
                assert directory.members["a"] == Member(FULL, load(running=3, ttft_s=0.2), cache)
                late: list[Event] = []
                stop = directory.listen(late.append)
                assert late == [Joined(directory.members["a"])]
                stop()
                other = instance(role=Role.DECODE)
                assert await registration.update(other)
                await until(lambda: directory.members["a"].instance == other, "the change")
                assert directory.members["a"] == Member(other, load(running=3, ttft_s=0.2), cache)
            await until(lambda: not directory.members, "the leaving")
        kinds = [type(event) for event in events]
        assert kinds[:4] == [Joined, Changed, Changed, Changed]
        assert kinds[-1] is Left
        assert kinds.count(Left) == kinds.count(Joined) == 1
        assert isinstance(events[3], Changed)
        assert (events[3].before.instance.role, events[3].member.instance.role) == (Role.MIX, Role.DECODE)
        assert len(late) == 1
        metrics = registry.metrics
        assert metrics.cluster_internal.value() == 0
        assert metrics.cluster_joined.value() == metrics.cluster_left.value() >= 1
        assert metrics.cluster_requests.value() >= 1

    within(body)


def test_a_restarted_instance_comes_with_a_new_incarnation_and_the_old_one_is_silent(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        events: list[Event] = []
        async with Directory(registry, keys) as directory:
            directory.listen(events.append)
            old = Registration(registry, keys.instance("a"), instance(incarnation="old"), 30)
            await old.open()
            assert await old.report(keys.instance("a", "load"), load("old", running=9))
            await until(lambda: "a" in directory.members and directory.members["a"].load is not None, "the old one")
            new = Registration(registry, keys.instance("a"), instance(incarnation="new"), 30)
            await new.open()  # the old one's lease still runs
            await until(lambda: directory.members["a"].instance.incarnation == "new", "the new one")
            assert directory.members["a"].load is None
            assert not await old.report(keys.instance("a", "load"), load("old", running=8))
            assert not await old.update(instance(incarnation="old", role=Role.MIX))
            assert await new.report(keys.instance("a", "load"), load("new", running=1))
            await until(lambda: directory.members["a"].load == load("new", running=1), "the new one's report")
            # A stale report that reaches the registry all the same does not count.
            await registry.put(keys.instance("a", "load"), encode(load("old", running=7)))
            await until(lambda: registry.metrics.cluster_unread.value(reason="stale") == 1, "the stale report")
            assert directory.members["a"].load == load("new", running=1)
            await old.close()  # its lease takes nothing of the new one along
            await registry.range(prefix)
            assert directory.members["a"].instance.incarnation == "new"
            await new.close()
            await until(lambda: not directory.members, "the leaving")
        joins = [one for one in told(events) if one[0] is not Changed]
        assert joins == [(Joined, "a", "old"), (Left, "a", "old"), (Joined, "a", "new"), (Left, "a", "new")]

    within(body)


def test_a_name_that_is_taken_silences_its_former_owner() -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry:
            keys = Keys()
            old = Registration(registry, keys.instance("a"), instance(incarnation="old"), 0.2)
            new = Registration(registry, keys.instance("a"), instance(incarnation="new"), 30)
            await old.open()
            await new.open()
            await asyncio.wait_for(old.superseded.wait(), 5)
            assert not new.superseded.is_set()
            await old.close()
            entry = await registry.get(keys.instance("a"))
            assert entry
            assert decode(entry, Instance) == instance(incarnation="new")
            await new.close()

    asyncio.run(main())


@pytest.mark.parametrize("loss", ["lease", "key", "foreign value"])
def test_a_registration_that_was_lost_comes_again(loss: str) -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry:
            keys = Keys()
            key = keys.instance("a")
            async with Registration(registry, key, instance(), 0.3) as registration:
                before = await registry.get(key)
                assert before
                if loss == "lease":
                    await registry.revoke(before.lease)
                elif loss == "key":
                    await registry.delete(key)
                else:
                    await registry.put(key, encode(instance(role=Role.MIX)))
                async with registry.watch(key, await registry.range(key)) as watch:
                    change = (await asyncio.wait_for(anext(watch), 5))[-1]
                assert change.entry
                assert change.entry.value == encode(instance())
                assert change.entry.lease
                assert await registration.report(keys.instance("a", "load"), load())

    asyncio.run(main())


def test_an_opening_that_is_cancelled_leaves_nothing_behind() -> None:
    class Late(MemoryRegistry):
        """Answers a put long after it has been applied."""

        async def put(self, key: str, value: bytes, lease: int = 0) -> int:
            await super().put(key, value, lease)
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> None:
        async with Late() as registry:
            key = Keys().instance("a")
            opening = asyncio.ensure_future(Registration(registry, key, instance(), 30).open())
            async with registry.watch(key, await registry.range(key)) as watch:
                assert (await asyncio.wait_for(anext(watch), 5))[0].entry
                opening.cancel()
                assert (await asyncio.wait_for(anext(watch), 5))[0].entry is None

    asyncio.run(main())


def test_a_drained_instance_is_drained_for_all_until_it_leaves(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        with pytest.raises(InputError, match="instance 'a': is not there"):
            await drain(registry, keys, "a")
        async with Directory(registry, keys) as one, Directory(registry, keys) as other:
            async with Registration(registry, keys.instance("a"), FULL, 30):
                for directory in (one, other):
                    await until(lambda: "a" in directory.members, "the join")  # noqa: B023 - here
                await drain(registry, keys, "a")
                for directory in (one, other):
                    await until(lambda: directory.members["a"].drain is not None, "draining")  # noqa: B023 - here
                await undrain(registry, keys, "a")
                await undrain(registry, keys, "a")
                for directory in (one, other):
                    await until(lambda: directory.members["a"].drain is None, "no draining")  # noqa: B023 - here
                await drain(registry, keys, "a")
            await until(lambda: not one.members, "the leaving")
            async with Registration(registry, keys.instance("a"), instance(incarnation="2"), 30):
                await until(lambda: "a" in one.members, "the next one")
                assert one.members["a"].drain is None

    within(body)


def test_a_drained_instance_whose_lease_was_lost_comes_back_drained(within: Within) -> None:
    """As after an outage of the registry that was longer than leases."""

    async def body(registry: Registry, prefix: str) -> None:
        keys, events = Keys(prefix.strip("/")), list[Event]()
        async with (
            Registration(registry, keys.instance("a"), FULL, 1.0) as registration,
            Directory(registry, keys) as one,
        ):
            one.listen(events.append)
            assert await registration.report(keys.instance("a", "load"), load())
            await drain(registry, keys, "a")
            await until(
                lambda: "a" in one.members and None not in (one.members["a"].load, one.members["a"].drain), "all"
            )
            entry = await registry.get(keys.instance("a"))
            assert entry
            await registry.revoke(entry.lease)
            await until(lambda: [*map(type, events)][-2:] == [Left, Joined], "that it left and came back")
            async with Directory(registry, keys) as other:
                assert await other.wait(10)
                for directory in (one, other):
                    member = directory.members["a"]
                    assert (member.load, member.drain is not None) == (None, True)
            assert await registration.report(keys.instance("a", "load"), load(running=2))
            await until(lambda: one.members["a"].load == load(running=2), "the next report")

    within(body)


def test_values_that_cannot_be_read_are_counted_and_left_out(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        good = encode(instance("good"))
        bad = {
            "text": b"\xff{",
            "utf8": b'{"name":"\xff","incarnation":"1","http":"h"}',
            "deep": b'{"name":"deep","incarnation":"1","http":"h","later":' + 50_000 * b"[" + 50_000 * b"]" + b"}",
            "type": b'{"name":"type","incarnation":"1","http":5}',
            "short": b'{"name":"short"}',
            "newer": good.replace(b'"name":"good"', b'"name":"newer"').replace(b'"v":1', b'"v":2'),
            "newer2": b'{"v":2,"name":["newer2"]}',
            "misplaced": good,
            "rank": b'{"name":"rank","incarnation":"1","http":"h","events":[{"endpoint":"e","rank":-1}]}',
        }
        for name, value in bad.items():
            await registry.put(keys.instance(name), value)
        more = good.replace(b'{"', b'{"of_a_later_version":[1],"', 1)
        await registry.put(keys.instance("good"), more)
        await registry.put(f"{keys.instances}good", b"")  # no part
        await registry.put(keys.instance("good", "load"), b'{"incarnation":"1","time":0,"kv_usage":2}')
        async with Directory(registry, keys) as directory:
            assert await directory.wait(10)
            assert dict(directory.members) == {"good": Member(instance("good"))}
            unread = registry.metrics.cluster_unread
            assert {
                reason: unread.value(kind="Instance", reason=reason) for reason in ("malformed", "newer", "misplaced")
            } == {
                "malformed": 6,
                "newer": 2,
                "misplaced": 1,
            }
            assert unread.value(kind="Load") == 1
            await registry.put(keys.instance("good"), b"{}")  # what stands there now is nobody
            await until(lambda: not directory.members, "the leaving")

    within(body)


def test_a_report_of_more_than_there_can_be_is_none() -> None:
    """2^63 requests ended every choice of a scheduler: its ledger has no room for that many."""
    known = encode(load(waiting=1 << 53))
    for value, wanted in (
        (known, load(waiting=1 << 53)),
        (known.replace(b"9007199254740992", b"9223372036854775808"), Unread.MALFORMED),
    ):
        assert decode(Entry("a", value, 1, 1, 1, 0), Load) == wanted


def test_a_bug_in_a_listener_keeps_nothing_from_the_others() -> None:
    async def main() -> None:
        async with MemoryRegistry() as registry, Directory(registry, Keys()) as directory:
            events: list[Event] = []
            directory.listen(lambda event: events[99:][event is None])
            directory.listen(events.append)
            await registry.put(Keys().instance("a"), encode(instance()))
            await until(lambda: len(events) == 1, "the join")
            assert registry.metrics.cluster_internal.value() == 1

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "a/b", "x" * 201, "a\n"])
def test_names_that_cannot_be_keys(name: str) -> None:
    with pytest.raises(InputError, match="without a slash"):
        Keys().instance(name)
    with pytest.raises(InputError, match="Instance"):
        encode(instance(name))


def test_replicas_are_followed(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        replica = Replica(name="r", incarnation="1", http="http://10.0.0.1:80", rpc="10.0.0.1:81")
        await registry.put(keys.replica("bad"), b"[]")
        async with Replicas(registry, keys) as replicas:
            assert await replicas.wait(10)
            assert dict(replicas.replicas) == {}
            async with Registration(registry, keys.replica("r"), replica, 30):
                await until(lambda: dict(replicas.replicas) == {"r": replica}, "the replica")
            await until(lambda: not replicas.replicas, "its end")
        assert registry.metrics.cluster_unread.value(kind="Replica") == 1

    within(body)


def test_a_shared_setting_is_followed_and_a_bad_one_is_not(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        keys = Keys(prefix.strip("/"))
        seen: list[float] = []
        async with Shared(registry, keys, "ttft", float, 2.0, seen.append) as ttft:
            assert await ttft.wait(10)
            assert ttft.value == 2.0
            await put_setting(registry, keys, "ttft", 1.5)
            await put_setting(registry, keys, "ttft2", 9)
            await registry.put(keys.setting("ttft"), b'"soon"')
            await registry.put(keys.setting("ttft"), b'"\xff"')
            await put_setting(registry, keys, "ttft", 3)
            await until(lambda: seen == [1.5, 3.0], "the values")
            await registry.delete(keys.setting("ttft"))
            await until(lambda: ttft.value == 2.0, "the default")
        assert registry.metrics.cluster_unread.value(kind="setting") == 2
        assert registry.metrics.cluster_internal.value() == 0

    within(body)


def test_the_last_state_stands_while_the_registry_is_away() -> None:
    async def main() -> None:
        registry = MemoryRegistry()
        await registry.put(Keys().instance("a"), encode(instance()))
        async with Directory(registry, Keys()) as directory:
            assert await directory.wait(5)
            await until(lambda: directory.connected, "the watch")
            await registry.close()
            await until(lambda: not directory.connected, "the end")
            assert list(directory.members) == ["a"]

    asyncio.run(main())


def test_a_registry_that_grants_nothing_is_not_asked_in_a_tight_loop() -> None:
    """An etcd that is full refuses at once, and still answers what stands there."""

    class Full(MemoryRegistry):
        refused: int | None = None

        async def grant(self, ttl_s: float) -> Grant:
            if self.refused is None:
                return await super().grant(ttl_s)
            self.refused += 1
            await asyncio.sleep(0)
            raise ClusterError("mvcc: database space exceeded")

    async def main() -> None:
        async with Full() as registry, Registration(registry, Keys().instance("a"), instance(), 60) as registration:
            registry.refused = 0
            assert registration._lease
            registration._lease.gone.set()
            for _ in range(100):
                await asyncio.sleep(0)
            assert registry.refused == 1

    asyncio.run(main())
