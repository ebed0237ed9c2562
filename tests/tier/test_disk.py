"""The disk tier when nothing goes wrong: what is written is found, capacity holds, a restart is warm."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from cairn.errors import InputError
from cairn.kv import KVGeometry
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.disk import DiskTier
from tests.tier.rig import (
    GEOMETRY,
    PADDED,
    SLOT_BYTES,
    capacity,
    filled,
    get,
    memory,
    namespace,
    opened,
    prompt,
    put,
    soon,
)


def disk_usage(path: Path) -> tuple[int, int]:
    """Bytes of all files as their sizes say, and as the file system counts."""
    stats = [file.stat() for file in path.iterdir()]
    return sum(s.st_size for s in stats), sum(s.st_blocks * 512 for s in stats)


@pytest.mark.parametrize("geometry", [GEOMETRY, PADDED])
def test_round_trip(tmp_path: Path, geometry: KVGeometry) -> None:
    keys = prompt(1, 6)
    with opened(tmp_path, geometry=geometry) as tier:
        assert tier.match(keys) == 0
        assert put(tier, keys) == [None] * 6
        assert tier.match(keys) == 6
        assert get(tier, keys) == [None] * 6
        assert get(tier, keys, first=4) == [None] * 2
        assert get(tier, prompt(2, 2)) == [Reason.EVICTED] * 2
        assert tier.stats()["read_bytes"] == 8 * geometry.block_bytes


def test_rows_are_where_the_caller_says(tmp_path: Path) -> None:
    keys = prompt(1, 3)
    with opened(tmp_path) as tier:
        rows = filled(keys[[2, 0, 1]])
        order = Rows(rows.memory, np.array([1, 2, 0], np.int32))
        assert tier.write(keys, 0, order, namespace=namespace(), deadline=soon()).result(60) == [None] * 3
        assert get(tier, keys) == [None] * 3


def test_writes_continue_a_chain_and_no_block_twice(tmp_path: Path) -> None:
    keys = prompt(1, 8)
    with opened(tmp_path) as tier:
        assert put(tier, keys[:3]) == [None] * 3
        assert put(tier, keys) == [None] * 8
        assert put(tier, keys, first=5) == [None] * 3
        assert tier.stats()["written_blocks"] == 8
        assert get(tier, keys) == [None] * 8


def test_a_block_without_its_parent_is_not_stored(tmp_path: Path) -> None:
    keys = prompt(1, 4)
    with opened(tmp_path) as tier:
        assert put(tier, keys, first=2) == [Reason.NO_PARENT] * 2
        assert tier.stats()["written_blocks"] == 0


def test_a_chain_may_be_queued_piece_by_piece(tmp_path: Path) -> None:
    keys = prompt(1, 24)
    rows = filled(keys)
    with opened(tmp_path, threads=3) as tier:
        futures = [
            tier.write(
                keys[: first + 2],
                first,
                Rows(rows.memory, rows.ids[first : first + 2]),
                namespace=namespace(),
                deadline=soon(),
            )
            for first in range(0, 24, 2)
        ]
        assert [future.result(60) for future in futures] == [[None] * 2] * 12
        assert tier.match(keys) == 24
        assert tier.stats()["written_blocks"] == 24
        assert get(tier, keys) == [None] * 24


def test_the_same_chain_at_once_is_written_once(tmp_path: Path) -> None:
    keys = prompt(1, 12)
    rows = filled(keys)
    with opened(tmp_path, threads=3) as tier:
        futures = [tier.write(keys, 0, rows, namespace=namespace(), deadline=soon()) for _ in range(8)]
        assert [future.result(60) for future in futures] == [[None] * 12] * 8
        assert tier.stats()["written_blocks"] == 12


def test_a_long_queue_of_dependent_writes_needs_no_stack(tmp_path: Path) -> None:
    """The first write is held up until 2,000 others have done all but their commit."""
    keys = prompt(1, 2000)
    rows = filled(keys)
    with opened(tmp_path, slots=2000, threads=2) as tier:
        gate, reached, write = Event(), Event(), tier._slots.write

        def held(slot: int, run: list[bytes], *rest: object) -> Reason | None:
            if keys[0].tobytes() in run:
                assert gate.wait(60)
            if keys[-1].tobytes() in run:
                reached.set()
            return write(slot, run, *rest)  # type: ignore[arg-type]

        tier._slots.write = held  # type: ignore[method-assign]
        futures = [
            tier.write(
                keys[: i + 1], i, Rows(rows.memory, rows.ids[i : i + 1]), namespace=namespace(), deadline=soon(60)
            )
            for i in range(2000)
        ]
        assert reached.wait(60)
        assert tier.match(keys) == 0
        gate.set()
        assert all(future.result(60) == [None] for future in futures)
        assert tier.match(keys) == 2000


def test_eviction_keeps_to_the_capacity_in_bytes(tmp_path: Path) -> None:
    limit = capacity(10) + 5000
    tier = DiskTier(tmp_path, geometry=GEOMETRY, capacity_bytes=limit, threads=2)
    assert tier.stats()["capacity_blocks"] == 10
    for number in range(30):
        keys = prompt(number, 3)
        assert put(tier, keys) == [None] * 3
        assert get(tier, keys) == [None] * 3
        assert max(disk_usage(tmp_path)) <= limit
    assert tier.stats()["resident_blocks"] <= 10
    assert tier.stats()["evicted_blocks_total"] >= 80
    assert tier.match(prompt(0, 3)) == 0
    tier.sync(30)
    assert min(disk_usage(tmp_path)) > 10 * SLOT_BYTES
    assert max(disk_usage(tmp_path)) <= limit
    tier.close(30)


def test_a_batch_larger_than_the_tier_stores_what_fits(tmp_path: Path) -> None:
    keys = prompt(1, 12)
    with opened(tmp_path, slots=8) as tier:
        assert put(tier, keys) == [None] * 8 + [Reason.NO_SLOT] + [Reason.NO_PARENT] * 3
        assert get(tier, keys[:8]) == [None] * 8


def test_touch_keeps_and_remove_drops(tmp_path: Path) -> None:
    old, new = prompt(1, 4), prompt(2, 4)
    with opened(tmp_path, slots=8) as tier:
        put(tier, old)
        put(tier, new)
        tier.touch(old)
        put(tier, prompt(3, 4))
        assert (tier.match(old), tier.match(new)) == (4, 0)
        assert tier.remove(old[2]) == 2
        assert tier.match(old) == 2
        assert tier.remove(new[0]) == 0
    with opened(tmp_path, slots=8) as tier:
        assert tier.match(old) == 2


def test_restart_is_warm(tmp_path: Path) -> None:
    prompts = [prompt(number, 1 + number % 4) for number in range(12)]
    with opened(tmp_path) as tier:
        for keys in prompts:
            put(tier, keys)
    with opened(tmp_path) as tier:
        assert tier.stats()["restored_blocks"] == sum(len(keys) for keys in prompts)
        assert [tier.match(keys) for keys in prompts] == [len(keys) for keys in prompts]
        assert all(get(tier, keys) == [None] * len(keys) for keys in prompts)
        put(tier, prompt(50, 4))
        assert tier.match(prompts[0]) == 0  # the oldest goes first, as before the restart


@pytest.mark.parametrize("slots", [4, 16, 64])
def test_another_capacity_keeps_what_fits(tmp_path: Path, slots: int) -> None:
    prompts = [prompt(number, 2) for number in range(16)]
    with opened(tmp_path, slots=32) as tier:
        for keys in prompts:
            put(tier, keys)
    with opened(tmp_path, slots=slots) as tier:
        assert tier.stats()["capacity_blocks"] == slots
        assert sum(tier.match(keys) for keys in prompts) == min(slots, 32)
        assert max(disk_usage(tmp_path)) <= capacity(slots)
        for keys in prompts:
            assert set(get(tier, keys[: tier.match(keys)])) <= {None}


def test_what_a_smaller_capacity_dropped_does_not_come_back_with_a_larger_one(tmp_path: Path) -> None:
    keys = prompt(1, 30)
    with opened(tmp_path, slots=32) as tier:
        put(tier, keys)
    with opened(tmp_path, slots=8) as tier:
        kept = tier.match(keys)
    with opened(tmp_path, slots=32) as tier:
        assert tier.match(keys) == tier.stats()["restored_blocks"] == kept == 8
        assert get(tier, keys[:kept]) == [None] * kept


def test_namespaces_share_a_directory_but_no_block(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        put(tier, prompt(1, 3, salt=b"a"), salt=b"a")
        put(tier, prompt(1, 3, salt=b"b"), salt=b"b")
        assert tier.match(prompt(1, 3)) == 0
    with opened(tmp_path) as tier:
        assert get(tier, prompt(1, 3, salt=b"a")) == [None] * 3
        assert get(tier, prompt(1, 3, salt=b"b")) == [None] * 3


def test_past_deadlines_and_cancelled_calls_move_nothing(tmp_path: Path) -> None:
    keys, withdrawn = prompt(1, 3), Event()
    withdrawn.set()
    rows = filled(keys)
    with opened(tmp_path) as tier:
        late = tier.write(keys, 0, rows, namespace=namespace(), deadline=time.monotonic() - 1)
        assert late.result(60) == [Reason.TIMEOUT] * 3
        stopped = tier.write(keys, 0, rows, namespace=namespace(), deadline=soon(), cancel=withdrawn)
        assert stopped.result(60) == [Reason.CANCELLED] * 3
        assert (tier.match(keys), tier.stats()["written_blocks"]) == (0, 0)
        put(tier, keys)
        assert tier.read(keys, 0, rows, deadline=time.monotonic() - 1).result(60) == [Reason.TIMEOUT] * 3
        assert tier.read(keys, 0, rows, deadline=soon(), cancel=withdrawn).result(60) == [Reason.CANCELLED] * 3
        stats = tier.stats()
        assert (stats["timeout_total"], stats["cancelled_total"], stats["batches_under_way"]) == (6, 6, 0)
        assert get(tier, keys) == [None] * 3


def test_empty_batches_are_done(tmp_path: Path) -> None:
    none = Rows(memory(1), np.empty(0, np.int32))
    with opened(tmp_path) as tier:
        assert tier.write(prompt(1, 2)[:0], 0, none, namespace=namespace(), deadline=soon()).result(1) == []
        assert tier.read(prompt(1, 2), 2, none, deadline=soon()).result(1) == []


def test_a_closed_tier_refuses_and_stays_closed(tmp_path: Path) -> None:
    keys = prompt(1, 2)
    with opened(tmp_path) as tier:
        put(tier, keys)
    tier.close(1)
    assert tier.match(keys) == 0
    assert get(tier, keys) == put(tier, keys) == [Reason.CLOSED] * 2
    assert not tier.sync(1)
    assert tier.remove(keys[0]) == 0


def test_callers_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    keys, rows = prompt(1, 2), filled(prompt(1, 2))
    with pytest.raises(InputError, match=r"disk capacity of 100 bytes: must be at least \d+ bytes"):
        DiskTier(tmp_path, geometry=GEOMETRY, capacity_bytes=100)
    with pytest.raises(InputError, match="threads=0"):
        DiskTier(tmp_path, geometry=GEOMETRY, capacity_bytes=capacity(4), threads=0)
    with opened(tmp_path) as tier:
        with pytest.raises(InputError, match="must lie within it"):
            tier.read(keys, 1, rows, deadline=soon())
        with pytest.raises(InputError, match="page-aligned"):
            tier.read(keys, 0, Rows(np.zeros((2, 4097), np.uint8), rows.ids), deadline=soon())
        with pytest.raises(InputError, match="page-aligned"):
            tier.read(keys, 0, Rows(memory(4)[:, :2048], rows.ids), deadline=soon())
        with pytest.raises(InputError, match=r"rows 0\.\.1 of 1: must lie within the memory"):
            tier.read(keys, 0, Rows(rows.memory[:1], rows.ids), deadline=soon())
        with pytest.raises(InputError, match="namespace of 3 bytes"):
            tier.write(keys, 0, rows, namespace=b"abc", deadline=soon())


def test_load_cost_is_measured(tmp_path: Path) -> None:
    keys = prompt(1, 8)
    with opened(tmp_path) as tier:
        assert tier.load_cost() == (0.0, 0.0)
        put(tier, keys)
        for blocks in (1, 2, 4, 8):
            get(tier, keys[:blocks])
        cost = tier.load_cost()
        assert cost.seconds_per_call >= 0
        assert cost.seconds_per_byte >= 0
        assert sum(cost) > 0
        told = tier.stats()
        assert (told["load_seconds_per_call"], told["load_seconds_per_byte"]) == cost


def test_sync_says_whether_it_was_done(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        put(tier, prompt(1, 2))
        assert tier.sync(30)


def test_admission_spares_the_device(tmp_path: Path) -> None:
    first, second = prompt(1, 4), prompt(2, 4)
    with opened(tmp_path, write_budget_bytes_per_day=4 * SLOT_BYTES) as tier:
        assert put(tier, first) == [None] * 4
        assert put(tier, second) == [Reason.NOT_ADMITTED] * 4
        assert put(tier, second) == [None] * 4  # seen before
        assert put(tier, first) == [None] * 4  # there already: costs nothing
        assert tier.stats()["not_admitted_total"] == 4
        assert tier.stats()["written_bytes"] == 8 * SLOT_BYTES


def test_many_writers_and_readers_of_a_tiny_tier(tmp_path: Path) -> None:
    """Everything at once, with eviction all the time: whatever is served is right, and nothing is left over."""

    def work(seed: int) -> None:
        chooser = np.random.default_rng(seed)
        for _ in range(60):
            keys = prompt(int(chooser.integers(8)), 6)[: int(chooser.integers(1, 7))]
            put(tier, keys)
            get(tier, keys)
            if chooser.random() < 0.1:
                tier.remove(keys[int(chooser.integers(len(keys)))])

    with opened(tmp_path, slots=20, threads=4) as tier:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert tier._index.pinned == 0
        assert tier._index.occupancy().reserved == tier._index.occupancy().doomed == 0
        assert tier._writers._by_key == {}
        held = {n: tier.match(prompt(n, 6)) for n in range(8)}
    with opened(tmp_path, slots=20) as tier:
        assert {n: tier.match(prompt(n, 6)) for n in range(8)} == held
