"""What every store must do: one suite for all, against real servers."""

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.remote import Get, Put
from cairn.tier.remote.tier import Limits
from cairn.transport.moving import sums_of
from tests.tier.remote.rig import LIMITS, PACK, Place, ask, loaded, name_of, opened, raw_get, read, write
from tests.tier.rig import GEOMETRY, content, filled, memory, prompt, soon

_NUMBERS = itertools.count(1000)


def fresh(blocks: int) -> np.ndarray:
    """Keys that no other test of this session has."""
    return prompt(next(_NUMBERS), blocks)


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


# --- the store by itself ------------------------------------------------------------------------------------------


def test_objects_in_parts_come_back_in_other_parts(place: Place) -> None:
    store, name = place.open(), b"cairn/test/" + fresh(1).tobytes().hex().encode()
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    out = bytearray(len(data))
    try:
        assert store.put(
            [Put(name, [view(data[:5]), view(data[5:2_000_000]), view(data[2_000_000:])])], deadline=soon()
        ) == [None]
        pieces = [memoryview(out)[:1_000_001], memoryview(out)[1_000_001:1_000_002], memoryview(out)[1_000_002:]]
        assert store.get_into([Get(name, 0, pieces, whole=True)], deadline=soon()) == [len(data)]
        assert bytes(out) == data
        ranges = [bytearray(1000), bytearray(77)]
        gets = [Get(name, 0, [memoryview(ranges[0])]), Get(name, 2_000_001, [memoryview(ranges[1])])]
        assert store.get_into(gets, deadline=soon()) == [1000, 77]
        assert (bytes(ranges[0]), bytes(ranges[1])) == (data[:1000], data[2_000_001 : 2_000_001 + 77])
    finally:
        store.delete([name], deadline=soon())
        store.close()


def test_parts_are_summed_on_their_way(place: Place) -> None:
    """Or the tier would read them from memory again."""
    store, name = place.open(), b"cairn/test/" + fresh(1).tobytes().hex().encode()
    data = np.random.default_rng(1).integers(0, 256, 400_000, np.uint8).tobytes()
    parts = [view(bytes(size)) for size in (300_001, 95_903, 4096)]
    try:
        assert store.put([Put(name, [view(data)])], deadline=soon()) == [None]
        for whole, offset, wanted in ((True, 0, parts), (False, 300_001, parts[1:])):
            sums = sums_of(wanted)
            get = Get(name, offset, wanted, whole=whole, sums=sums)
            assert store.get_into([get], deadline=soon()) == [len(data) - offset]
            assert [one.tobytes() for one in sums] == [xxhash.xxh3_128_digest(part) for part in wanted]
        assert b"".join(parts) == data
    finally:
        store.delete([name], deadline=soon())
        store.close()


def test_what_is_not_there_is_absent(place: Place) -> None:
    store, names = place.open(), [b"cairn/test/" + fresh(1).tobytes().hex().encode() for _ in range(40)]
    try:
        assert store.exists(names, deadline=soon()) == [False] * 40
        assert raw_get(store, names[0], 10) is Reason.ABSENT
        assert store.get_into([Get(names[0], 5, [view(bytes(10))])], deadline=soon()) == [Reason.ABSENT]
        assert store.put([Put(name, [view(b"x" * 10)]) for name in names[::2]], deadline=soon()) == [None] * 20
        assert store.exists(names, deadline=soon()) == [True, False] * 20
        assert store.delete(names, deadline=soon()) is None
        assert store.delete(names, deadline=soon()) is None
        assert store.exists(names, deadline=soon()) == [False] * 40
        assert store.health(deadline=soon()) is None
    finally:
        store.close()


def test_short_objects_say_how_short(place: Place) -> None:
    store, name = place.open(), b"cairn/test/" + fresh(1).tobytes().hex().encode()
    try:
        assert store.put([Put(name, [view(b"abcdef")])], deadline=soon()) == [None]
        assert raw_get(store, name, 100) == b"abcdef"
        out = bytearray(4)
        assert store.get_into([Get(name, 4, [memoryview(out)])], deadline=soon()) == [2]
        assert bytes(out[:2]) == b"ef"
    finally:
        store.delete([name], deadline=soon())
        store.close()


def test_a_deadline_that_has_passed_is_a_timeout(place: Place) -> None:
    store, name = place.open(), b"cairn/test/late"
    try:
        past = time.monotonic() - 1
        assert store.exists([name], deadline=past) is Reason.TIMEOUT
        assert store.put([Put(name, [view(b"x")])], deadline=past) == [Reason.TIMEOUT]
        assert store.get_into([Get(name, 0, [view(b"x")])], deadline=past) == [Reason.TIMEOUT]
        assert store.delete([name], deadline=past) is Reason.TIMEOUT
        assert store.exists([name], deadline=soon()) == [False]
    finally:
        store.close()


# --- the tier over it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, PACK - 1, PACK, PACK + 1, 3 * PACK, 5 * PACK + 2])
def test_another_process_finds_what_was_stored(place: Place, blocks: int) -> None:
    keys = fresh(blocks)
    with opened(place) as writer:
        assert write(writer, keys) == [None] * blocks
        assert writer.match(keys) == blocks
    with opened(place) as reader:
        assert reader.match(keys) == 0
        assert ask(reader, keys) == blocks
        assert read(reader, keys) == [None] * blocks
        assert reader.stats()["read_blocks"] == blocks
        for first in range(blocks):
            assert read(reader, keys, first) == [None] * (blocks - first)


def test_a_longer_and_a_shorter_prompt_share_what_they_share(place: Place) -> None:
    keys = fresh(6 * PACK)
    with opened(place) as tier:
        assert write(tier, keys[: 2 * PACK + 2]) == [None] * (2 * PACK + 2)
    with opened(place) as tier:
        assert ask(tier, keys) == 2 * PACK + 2
        assert ask(tier, keys[: PACK + 3]) == PACK
        assert tier.write_start(keys) == 2 * PACK
        assert write(tier, keys, 2 * PACK) == [None] * (4 * PACK)
    with opened(place) as tier:
        assert loaded(tier, keys) == 6 * PACK
        assert loaded(tier, keys[: 2 * PACK + 2]) == 2 * PACK + 2


def test_a_prefix_of_512_objects_is_found_in_two_round_trips(place: Place) -> None:
    keys = fresh(512 * 2 + 5)
    with opened(place, pack=2) as tier:
        assert write(tier, keys[:-4], timeout=120) == [None] * (len(keys) - 4)
    with opened(place, pack=2) as tier:
        assert ask(tier, keys, 30) == len(keys) - 4
        assert tier.stats()["round_trips_total"] <= 2
    with opened(place, pack=2) as tier:
        assert ask(tier, keys[:-4], 30) == len(keys) - 4
        assert tier.stats()["round_trips_total"] <= 2
        assert ask(tier, keys[:-4]) == len(keys) - 4
        assert tier.stats()["round_trips_total"] <= 2


def test_blocks_that_are_there_are_not_written_again(place: Place) -> None:
    keys = fresh(3 * PACK)
    with opened(place) as tier:
        write(tier, keys)
    with opened(place) as tier:
        assert write(tier, keys) == [None] * len(keys)
        assert tier.stats()["written_blocks"] == 0


def test_many_writers_of_the_same_and_of_other_blocks(place: Place) -> None:
    shared, own = fresh(3 * PACK), [fresh(PACK + 1) for _ in range(4)]
    with opened(place) as one, opened(place) as two:
        written: list[list[Reason | None]] = []
        found: list[list[Reason | None]] = []

        def work(number: int) -> None:
            tier = (one, two)[number % 2]
            written.append(write(tier, shared))
            written.append(write(tier, own[number]))
            found.append(read(tier, shared))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [set(result) for result in written] == [{None}] * 8
        # Mooncake takes what another writer is still at for stored, and until he is done it is absent; who reads next
        # through the same tier finds that it has been forgotten for that.
        allowed = {None, Reason.ABSENT, Reason.EVICTED} if place.kind == "mooncake" else {None}
        assert len(found) == 4
        assert set().union(*found) <= allowed
    with opened(place) as reader:
        for keys in (shared, *own):
            assert loaded(reader, keys) == len(keys)


def test_deletion(place: Place) -> None:
    keys = fresh(2 * PACK)
    with opened(place) as tier:
        write(tier, keys)
        assert tier.remove(keys[-1]) == 1
        assert ask(tier, keys) == PACK
    with opened(place) as tier:
        assert ask(tier, keys) == PACK
        write(tier, keys)
        assert loaded(tier, keys) == 2 * PACK


def damaged(whole: bytes, how: str, other: bytes) -> bytes:
    """What may be found under an object's name, but must not be served."""
    middle = len(whole) // 2
    return {
        "empty": b"",
        "short": whole[:-1],
        "tail only": whole[-4096:],
        "without a tail": whole[:-4096],
        "torn": whole[:middle] + bytes(len(whole) - middle),
        "flipped in a block": whole[:700] + bytes([whole[700] ^ 4]) + whole[701:],
        "flipped in the tail": whole[:-4000] + bytes([whole[-4000] ^ 4]) + whole[-3999:],
        "flipped in the padding": whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:],
        "another's": other,
        "noise": np.random.default_rng(1).integers(0, 256, len(whole), np.uint8).tobytes(),
        "longer": other + bytes(5000),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "short",
        "tail only",
        "without a tail",
        "torn",
        "flipped in a block",
        "flipped in the tail",
        "flipped in the padding",
        "another's",
        "noise",
        "longer",
    ],
)
def test_what_is_not_the_object_is_a_counted_miss_and_goes(place: Place, how: str) -> None:
    keys, others = fresh(3 * PACK), fresh(PACK)
    with opened(place) as tier:
        write(tier, keys)
        write(tier, others)
        size = tier._machine.packing.object_bytes(PACK)
        name, store = name_of(tier, keys[: 2 * PACK]), tier._store
        whole, other = raw_get(store, name, size), raw_get(store, name_of(tier, others), size)
        assert isinstance(whole, bytes)
        assert isinstance(other, bytes)
        assert store.delete([name], deadline=soon()) is None
        assert store.put([Put(name, [view(damaged(whole, how, other))])], deadline=soon()) == [None]
        assert loaded(tier, keys) in range(PACK, 2 * PACK)
        stats = tier.stats()
        assert sum(stats[f"{reason}_total"] for reason in (Reason.CORRUPT, Reason.FOREIGN, Reason.ABSENT)) >= 1
        assert store.exists([name], deadline=soon()) == [False]
        assert not stats["breaker_open"]
    with opened(place) as tier:
        assert ask(tier, keys) == PACK
        assert set(write(tier, keys)) == {None}
        assert loaded(tier, keys) == 3 * PACK


def test_other_kinds_of_objects_are_not_even_found(place: Place) -> None:
    keys = fresh(4 * PACK)
    with opened(place) as tier:
        write(tier, keys)
    with opened(place, pack=2 * PACK) as tier:
        assert ask(tier, keys) == 0


def test_unused_objects_go_when_their_time_is_over(place: Place) -> None:
    if not place.has_ttl:
        pytest.skip(f"{place.kind}: its lifecycle rules do that")
    keys, kept = fresh(PACK), fresh(PACK)
    with opened(place, ttl_s=1.0, limits=LIMITS._replace(ttl_s=1.0)) as tier:
        write(tier, keys)
        write(tier, kept)
        assert ask(tier, keys) == PACK
        deadline = time.monotonic() + 20
        while True:
            tier._machine.known.clear()
            assert ask(tier, kept) == PACK, "what is used must stay"
            if place.kind == "files":
                tier._store.sweep()  # type: ignore[attr-defined]
            names = [name_of(tier, keys)]
            # Not by `exists`, which would count as a use.
            if raw_size(place, names[0]) == 0:
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        tier._machine.known.clear()
        assert ask(tier, keys) == 0


def raw_size(place: Place, name: bytes) -> int:
    """The size of an object, without using it."""
    if place.kind == "files":
        kind, _, key = name.decode().rpartition("/")
        path = Path(place.url.removeprefix("file://")) / kind / key[:2] / key
        return path.stat().st_size if path.exists() else 0
    import valkey

    with valkey.Valkey(port=int(place.url.rsplit(":", 1)[1])) as client:
        return int(client.strlen(name))


def test_second_touch_stores_what_comes_again(place: Place) -> None:
    keys = fresh(2 * PACK)
    with opened(place, limits=LIMITS._replace(second_touch=True)) as tier:
        assert write(tier, keys) == [Reason.NOT_ADMITTED] * len(keys)
        assert write(tier, keys) == [None] * len(keys)


def test_the_same_object_is_fetched_once(place: Place) -> None:
    """Eight requests for one prefix at a time: each object comes once from the store, and all get it."""
    keys = fresh(8 * PACK)
    with opened(place) as tier:
        write(tier, keys)
    with opened(place, limits=Limits(timeout_s=5, lookup_timeout_s=5, threads=1)) as tier:
        assert ask(tier, keys) == len(keys)
        fetched = []
        get_into = tier._store.get_into
        gate = threading.Event()

        def counted(gets: list[Get], *, deadline: float) -> list[int | Reason]:
            assert gate.wait(30)
            fetched.extend(get.name for get in gets)
            return get_into(gets, deadline=deadline)

        tier._store.get_into = counted  # type: ignore[method-assign]
        wanted = [Rows(memory(len(keys)), np.arange(len(keys), dtype=np.int32)) for _ in range(8)]
        futures = [tier.read(keys, 0, rows, deadline=soon()) for rows in wanted]
        gate.set()
        for future, rows in zip(futures, wanted, strict=True):
            assert future.result(60) == [None] * len(keys)
            assert all(np.array_equal(row, content(key)) for row, key in zip(rows.memory, keys, strict=True))
        assert len(fetched) == len(set(fetched)) == 8
        assert tier.stats()["shared_reads_total"] == 7 * 8


def test_who_has_more_time_does_not_end_with_the_first_one_who_asked(place: Place) -> None:
    keys = fresh(PACK)
    with opened(place) as tier:
        write(tier, keys)
        get_into, asked, gate = tier._store.get_into, threading.Event(), threading.Event()

        def late(gets: list[Get], *, deadline: float) -> list[int | Reason]:
            tier._store.get_into = get_into  # type: ignore[method-assign]
            asked.set()
            assert gate.wait(30)
            threading.Event().wait(max(0.0, deadline - time.monotonic()))  # as a store that does not answer
            return [Reason.TIMEOUT] * len(gets)

        tier._store.get_into = late  # type: ignore[method-assign]
        wanted = [Rows(memory(len(keys)), np.arange(len(keys), dtype=np.int32)) for _ in range(2)]
        first = tier.read(keys, 0, wanted[0], deadline=soon(1))
        assert asked.wait(30)
        second = tier.read(keys, 0, wanted[1], deadline=soon())
        gate.set()
        assert first.result(60) == [Reason.TIMEOUT] * len(keys)
        assert second.result(60) == [None] * len(keys)
        assert all(np.array_equal(row, content(key)) for row, key in zip(wanted[1].memory, keys, strict=True))
        assert tier.stats()["shared_reads_total"] == 1


def test_of_objects_read_together_each_is_proved_by_itself(place: Place) -> None:
    keys = fresh(8 * PACK)
    with opened(place, limits=LIMITS._replace(threads=1)) as tier:
        assert write(tier, keys) == [None] * len(keys)
        store, calls = tier._store, []
        get_into = store.get_into

        def counted(gets: list[Get], *, deadline: float) -> list[int | Reason]:
            calls.append(len(gets))
            return get_into(gets, deadline=deadline)

        gone, broken = name_of(tier, keys[: 2 * PACK]), name_of(tier, keys[: 4 * PACK])
        assert store.delete([gone, broken], deadline=soon()) is None
        assert store.put([Put(broken, [memoryview(bytes(PACK * GEOMETRY.block_bytes + 4096))])], deadline=soon()) == [
            None
        ]
        store.get_into = counted  # type: ignore[method-assign]
        try:
            outcomes = read(tier, keys)
        finally:
            store.get_into = get_into  # type: ignore[method-assign]
        good, absent, corrupt = [None] * PACK, [Reason.ABSENT] * PACK, [Reason.CORRUPT] * PACK
        assert outcomes == good + absent + good + corrupt + 4 * good
        assert calls == [8 // store.calls] * store.calls
        assert store.exists([broken], deadline=soon()) == [False]


def test_a_request_that_gives_up_does_not_take_the_others_along(place: Place) -> None:
    keys = fresh(2 * PACK)
    with opened(place) as tier:
        write(tier, keys)
    with opened(place, limits=LIMITS._replace(threads=1)) as tier:
        assert ask(tier, keys) == len(keys)
        gate, cancel = threading.Event(), threading.Event()
        tier._readers.submit(gate.wait, urgent=True)  # type: ignore[arg-type]
        rows = [Rows(memory(len(keys)), np.arange(len(keys), dtype=np.int32)) for _ in range(3)]
        first = tier.read(keys, 0, rows[0], deadline=soon(), cancel=cancel)
        second = tier.read(keys, 0, rows[1], deadline=soon())
        late = tier.read(keys, 0, rows[2], deadline=time.monotonic() + 0.05)
        cancel.set()
        assert late.result(10) == [Reason.TIMEOUT] * len(keys)
        gate.set()
        assert first.result(10) == [Reason.CANCELLED] * len(keys)
        assert second.result(10) == [None] * len(keys)


def test_rows_and_arguments_are_checked(place: Place) -> None:
    from cairn.errors import InputError

    keys = fresh(2)
    with opened(place) as tier:
        with pytest.raises(InputError, match="must lie within it"):
            tier.read(keys, 1, filled(keys), deadline=soon())
        with pytest.raises(InputError, match="must lie within the memory"):
            tier.read(keys, 0, Rows(memory(1), np.array([0, 1], np.int32)), deadline=soon())
        with pytest.raises(InputError, match="must be the 16"):
            tier.write(keys, 0, filled(keys), namespace=b"short", deadline=soon())
        with pytest.raises(InputError, match="must hold a block"):
            tier.read(keys, 0, Rows(memory(2)[:, :100], np.arange(2, dtype=np.int32)), deadline=soon())
    assert tier.read(keys, 0, filled(keys), deadline=soon()).result(1) == [Reason.CLOSED] * 2
