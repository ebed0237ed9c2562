"""The registry's contract, on both implementations."""

import asyncio
from collections.abc import Callable

import pytest

from cairn.cluster.base import MAX_KEY, MAX_VALUE, Change, Check, Delete, Entry, Listing, Put, Registry, Watch
from cairn.errors import ClosedError, InputError, LeaseLostError
from tests.cluster.conftest import Body

Within = Callable[[Body], None]


async def following(watch: Watch, count: int) -> list[Change]:
    """The next `count` changes."""
    changes: list[Change] = []
    while len(changes) < count:
        changes += await asyncio.wait_for(anext(watch), 10)
    return changes


def test_a_key_lives_through_revisions_and_versions(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        key = f"{prefix}a"
        assert await registry.get(key) is None
        first = await registry.put(key, b"1")
        second = await registry.put(key, b"2")
        assert second == first + 1
        assert await registry.get(key) == Entry(key, b"2", first, second, 2, 0)
        assert await registry.delete(key) is True
        assert await registry.delete(key) is False
        third = await registry.put(key, b"")
        assert third == second + 2  # a deletion has a revision, a deletion of nothing has none
        assert await registry.get(key) == Entry(key, b"", third, third, 1, 0)

    within(body)


def test_a_range_is_its_prefix_in_order_and_at_one_revision(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        # More than one page, and neighbours that are not in it.
        names = [f"{prefix}in/{i:04}" for i in range(450)]
        await asyncio.gather(*(registry.put(name, name.encode()) for name in reversed(names)))
        for name in ("im", "in", "in0", "io"):
            await registry.put(prefix + name, b"")
        listing = await registry.range(f"{prefix}in/")
        assert [entry.key for entry in listing.entries] == names
        assert [entry.value.decode() for entry in listing.entries] == names
        assert listing.revision >= max(entry.modified for entry in listing.entries)
        assert len((await registry.range("")).entries) >= 454
        assert (await registry.range(f"{prefix}nothing")).entries == ()
        odd = prefix + "ünder/\udcff"  # others' keys need not be UTF-8
        await registry.put(odd, b"x")
        assert [entry.key for entry in (await registry.range(f"{prefix}ü")).entries] == [odd]

    within(body)


@pytest.mark.parametrize("check", ["absent", "created", "modified", "value"])
def test_a_transaction_is_applied_if_its_check_holds(within: Within, check: str) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        key, other = f"{prefix}key", f"{prefix}other"
        if check != "absent":
            await registry.put(key, b"0")
            await registry.put(key, b"1")
        entry = await registry.get(key)
        created, modified = (entry.created, entry.modified) if entry else (0, 0)
        right, wrong = {
            "absent": (Check.absent(key), Check(key, created=1)),
            "created": (Check(key, created=created), Check(key, created=modified)),
            "modified": (Check(key, modified=modified), Check(key, modified=created)),
            "value": (Check(key, value=b"1"), Check(key, value=b"")),
        }[check]
        before = await registry.put(other, b"before")
        outcome = await registry.transact([right, wrong], [Put(other, b"no")])
        assert outcome == (False, before, (entry, entry))
        outcome = await registry.transact([right], [Put(key, b"2"), Delete(other), Delete(f"{prefix}none")])
        assert (outcome.applied, outcome.revision) == (True, before + 1)
        now = await registry.get(key)
        assert now
        assert (now.value, now.modified, await registry.get(other)) == (b"2", before + 1, None)

    within(body)


def test_of_many_who_compare_and_set_all_count(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        key = f"{prefix}n"
        await registry.put(key, b"0")

        async def add() -> None:
            while True:
                entry = await registry.get(key)
                assert entry
                put = Put(key, str(int(entry.value) + 1).encode())
                if (await registry.transact([Check(key, modified=entry.modified)], [put])).applied:
                    return

        await asyncio.gather(*(add() for _ in range(12)))
        entry = await registry.get(key)
        assert entry
        assert (entry.value, entry.version) == (b"12", 13)

    within(body)


def test_keys_go_with_their_lease_at_one_revision(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        grant, other = await registry.grant(60), await registry.grant(60)
        assert grant.id != other.id
        assert grant.ttl_s == await registry.keep_alive(grant.id) == 60
        for name in "abc":
            await registry.put(prefix + name, b"", grant.id)
        await registry.put(f"{prefix}b", b"", other.id)  # hangs from the other now
        await registry.put(f"{prefix}c", b"")  # from none
        await registry.put(f"{prefix}d", b"", grant.id)
        watch = registry.watch(prefix, await registry.range(prefix))
        await registry.revoke(grant.id)
        gone = await following(watch, 2)
        assert sorted((change.key, change.entry) for change in gone) == [(f"{prefix}a", None), (f"{prefix}d", None)]
        assert gone[0].revision == gone[1].revision
        assert [entry.key for entry in (await registry.range(prefix)).entries] == [f"{prefix}b", f"{prefix}c"]
        await registry.revoke(grant.id)
        with pytest.raises(LeaseLostError):
            await registry.keep_alive(grant.id)
        with pytest.raises(LeaseLostError):
            await registry.put(f"{prefix}a", b"", grant.id)
        with pytest.raises(LeaseLostError):
            await registry.transact([], [Put(f"{prefix}x", b""), Put(f"{prefix}a", b"", grant.id)])
        assert await registry.get(f"{prefix}x") is None

    within(body)


def test_a_lease_expires_unless_it_is_kept_alive(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        ttl = 0.6 if type(registry).__name__ == "MemoryRegistry" else 2.0
        kept, left = await registry.grant(ttl), await registry.grant(ttl)
        await registry.put(f"{prefix}kept", b"", kept.id)
        await registry.put(f"{prefix}left", b"", left.id)
        watch = registry.watch(prefix, await registry.range(prefix))
        loop = asyncio.get_running_loop()
        begun, waiting = loop.time(), asyncio.ensure_future(following(watch, 1))
        while not waiting.done():
            await registry.keep_alive(kept.id)
            await asyncio.wait([waiting], timeout=ttl / 5)
        assert [(change.key, change.entry) for change in await waiting] == [(f"{prefix}left", None)]
        assert ttl - 0.5 < loop.time() - begun < ttl + 3
        with pytest.raises(LeaseLostError):
            await registry.keep_alive(left.id)
        assert await registry.get(f"{prefix}kept")

    within(body)


def test_a_watch_brings_every_change_once_and_in_order(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        await registry.put(f"{prefix}before", b"")
        listing = await registry.range(prefix)
        await registry.put(f"{prefix}between", b"")
        watch = registry.watch(prefix, listing)
        await registry.transact([], [Put(f"{prefix}x", b"1"), Delete(f"{prefix}before")])
        await registry.put("/elsewhere", b"")
        for i in range(20):
            await registry.put(f"{prefix}x", str(i).encode())
        changes = await following(watch, 23)
        assert [change.key for change in changes[:3]] in (
            [f"{prefix}between", f"{prefix}x", f"{prefix}before"],
            [f"{prefix}between", f"{prefix}before", f"{prefix}x"],
        )
        assert changes[1].revision == changes[2].revision
        assert [change.entry.value for change in changes[3:] if change.entry] == [str(i).encode() for i in range(20)]
        assert [change.revision for change in changes] == sorted(change.revision for change in changes)
        # From an older revision: the same again.
        again = registry.watch(prefix, listing)
        assert await following(again, 23) == changes

    within(body)


def test_a_wait_for_changes_that_is_cancelled_loses_none(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        watch = registry.watch(prefix, await registry.range(prefix))
        seen: list[Change] = []
        for i in range(30):
            await registry.put(f"{prefix}{i}", b"")
            for _ in range(3):
                try:
                    seen += await asyncio.wait_for(anext(watch), 0.002)
                except TimeoutError:
                    continue
        seen += await following(watch, 30 - len(seen))
        assert [change.key for change in seen] == [f"{prefix}{i}" for i in range(30)]

    within(body)


def test_closing_ends_what_waits(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        listing = await registry.range(prefix)
        first, second = registry.watch(prefix, listing), registry.watch(prefix, listing)
        waits = [asyncio.ensure_future(anext(watch, None)) for watch in (first, second)]
        await registry.range(prefix)  # a round trip, in which they begin to wait
        await first.close()
        assert await asyncio.wait_for(waits[0], 5) is None
        assert not waits[1].done()
        await registry.close()
        assert await asyncio.wait_for(waits[1], 5) is None
        for call in (registry.get("a"), registry.put("a", b""), registry.grant(5), registry.transact([], [])):
            with pytest.raises(ClosedError):
                await call
        with pytest.raises(ClosedError):
            registry.watch(prefix, listing)
        await registry.close()

    within(body)


def test_what_breaks_a_bound_is_refused(within: Within) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        for call in (
            registry.put("", b""),
            registry.put("x" * (MAX_KEY + 1), b""),
            registry.put("x", bytes(MAX_VALUE + 1)),
            registry.get(""),
            registry.grant(0),
            registry.grant(float("nan")),
            registry.transact([], [Put("x", b""), Delete("x")]),
            registry.transact([], [Put(str(i), b"") for i in range(129)]),
            registry.transact([Check("x")], []),
            registry.transact([Check("x", created=1, modified=1)], []),
        ):
            with pytest.raises(InputError):
                await call
        await registry.put(f"{prefix}large", bytes(MAX_VALUE))
        listing = await registry.range(prefix)
        assert [len(entry.value) for entry in listing.entries] == [MAX_VALUE]

    within(body)


def test_the_difference_comes_where_the_history_was_compacted(within: Within, request: pytest.FixtureRequest) -> None:
    async def body(registry: Registry, prefix: str) -> None:
        for name in "abcd":
            await registry.put(prefix + name, b"old")
        listing = await registry.range(prefix)
        watch, bare = registry.watch(prefix, listing), registry.watch(prefix, Listing((), listing.revision))
        await registry.delete(f"{prefix}a")
        await registry.put(f"{prefix}b", b"new")
        await registry.delete(f"{prefix}c")
        await registry.put(f"{prefix}c", b"again")
        await registry.put(f"{prefix}e", b"1")
        await registry.delete(f"{prefix}e")
        revision = await registry.put(f"{prefix}f", b"")
        if hasattr(registry, "compact"):
            registry.compact(revision)
        else:
            request.getfixturevalue("one_etcd").members[0].compact(revision)
        changes = await following(watch, 4)
        told = {change.key.removeprefix(prefix): change.entry and change.entry.value for change in changes}
        assert told == {"a": None, "b": b"new", "c": b"again", "f": b""}
        assert registry.metrics.cluster_watch_resumes.value(reason="compacted") == 1
        await registry.put(f"{prefix}g", b"")
        assert [change.key for change in await following(watch, 1)] == [f"{prefix}g"]
        # Without the entries it cannot know of deletions, and says of the others what stands there.
        keys = {change.key.removeprefix(prefix) for change in await following(bare, 5)}
        assert keys == {"b", "c", "d", "f", "g"}

    within(body)
