"""Faults made for the test: flipped, cut and foreign bytes, a failing and a stuck device. All become misses."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from cairn.codec import Raw
from cairn.codec.base import Octets
from cairn.codec.frame import Framer
from cairn.index.slots import SlotIds
from cairn.observe.reasons import Reason
from cairn.tier.base import Rows
from cairn.tier.breaker import Breaker
from cairn.tier.disk import DiskTier
from cairn.tier.disk_directory import RECORD_BYTES
from cairn.tier.disk_slots import SlotFile
from cairn.tier.disk_table import recover
from tests.tier.rig import (
    GEOMETRY,
    PADDED,
    PAGE,
    SLOT_BYTES,
    content,
    filled,
    get,
    memory,
    namespace,
    opened,
    prompt,
    put,
    soon,
)


@contextmanager
def replaced(fd: int, path: str, flags: int = os.O_RDWR) -> Iterator[None]:
    """Lets `fd` mean another file for a while."""
    kept, other = os.dup(fd), os.open(path, flags)
    os.dup2(other, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        os.close(other)


def flip(path: Path, at: int, value: int) -> None:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ value]), at)


def test_10_000_flips_of_a_slot_are_misses(tmp_path: Path) -> None:
    """Every byte of header page and payload is covered: none of the flips may be served as the block."""
    path, key = tmp_path / "data", prompt(1, 1)[0]
    path.write_bytes(bytes(SLOT_BYTES))
    file = SlotFile(path, Framer(Raw(GEOMETRY)))
    row = memory(1)[0]
    row[:] = content(key)
    assert file.write(0, [key.tobytes()], namespace(), [row], [file.sum(row)]) is None
    slot = memory(2).reshape(-1)
    assert os.preadv(file.fd, [slot.data], 0) == SLOT_BYTES
    chooser = np.random.default_rng(2)
    places = np.concatenate([np.arange(SLOT_BYTES), chooser.integers(0, SLOT_BYTES, 10_000 - SLOT_BYTES)])
    for at, value in zip(places.tolist(), chooser.integers(1, 256, len(places)).tolist(), strict=True):
        slot[at] ^= value
        os.pwritev(file.fd, [slot.data], 0)
        slot[at] ^= value
        assert file.read(0, [key.tobytes()], [row]) == [Reason.CORRUPT], f"byte {at} ^ {value}"
    os.pwritev(file.fd, [slot.data], 0)
    assert file.read(0, [key.tobytes()], [row]) == [None]
    file.close()


def test_flips_in_the_padding_harm_nobody(tmp_path: Path) -> None:
    keys = prompt(1, 1)
    with opened(tmp_path, geometry=PADDED) as tier:
        put(tier, keys)
        slot = int(tier.slots_of(keys)[0])
        for at in range(PAGE + PADDED.block_bytes, SLOT_BYTES, 37):
            flip(tmp_path / "data", slot * SLOT_BYTES + at, 0x55)
            assert get(tier, keys) == [None]


def test_2_000_flips_of_records_are_seen(tmp_path: Path) -> None:
    """Also of empty ones: they never turn into a block."""
    with opened(tmp_path, slots=8) as tier:
        put(tier, prompt(1, 5))
    table = (tmp_path / "table").read_bytes()
    chooser = np.random.default_rng(3)
    fd = os.open(tmp_path / "table", os.O_RDWR)
    before = {key.tobytes() for key in recover(fd, 8).keys}
    for at, value in zip(
        chooser.integers(0, 8 * RECORD_BYTES, 2000).tolist(), chooser.integers(1, 256, 2000).tolist(), strict=True
    ):
        os.pwrite(fd, bytes([table[at] ^ value]), at)
        found = recover(fd, 8)
        os.pwrite(fd, table[at : at + 1], at)
        assert found.damaged == 1
        assert {key.tobytes() for key in found.keys} <= before
        assert at // RECORD_BYTES not in found.slots
    os.close(fd)


def test_a_damaged_record_costs_its_block_and_what_follows(tmp_path: Path) -> None:
    keys, other = prompt(1, 5), prompt(2, 3)
    with opened(tmp_path) as tier:
        put(tier, keys)
        put(tier, other)
        slot = int(tier.slots_of(keys)[2])
    flip(tmp_path / "table", slot * RECORD_BYTES + 20, 0x01)
    with opened(tmp_path) as tier:
        assert tier.stats()["damaged_records"] == 1
        assert tier.match(keys) == 2
        assert get(tier, keys[:2]) == [None] * 2
        assert get(tier, other) == [None] * 3
        assert put(tier, keys) == [None] * 5
        assert get(tier, keys) == [None] * 5
    with opened(tmp_path) as tier:
        assert tier.stats()["damaged_records"] == 0
        assert tier.match(keys) == 5


@pytest.mark.parametrize("at", [0, 30, 2000, PAGE, SLOT_BYTES - 1])
def test_a_damaged_block_is_a_miss_and_goes_with_what_follows(tmp_path: Path, at: int) -> None:
    keys, other = prompt(1, 5), prompt(2, 2)
    with opened(tmp_path) as tier:
        put(tier, keys)
        put(tier, other)
        flip(tmp_path / "data", int(tier.slots_of(keys)[2]) * SLOT_BYTES + at, 0x80)
        outcomes = get(tier, keys)
        assert outcomes == [None, None, Reason.CORRUPT, None, None]
        assert tier.match(keys) == 2
        assert tier.stats()["corrupt_total"] == 1
        assert tier.stats()["dropped_blocks"] == 3
        assert get(tier, other) == [None] * 2
        assert put(tier, keys) == [None] * 5
        assert get(tier, keys) == [None] * 5


def test_a_dropped_block_stays_away_after_a_restart(tmp_path: Path) -> None:
    keys = prompt(1, 4)
    with opened(tmp_path) as tier:
        put(tier, keys)
        flip(tmp_path / "data", int(tier.slots_of(keys)[1]) * SLOT_BYTES, 1)
        get(tier, keys)
    with opened(tmp_path) as tier:
        assert (tier.match(keys), tier.stats()["damaged_records"]) == (1, 0)


def test_another_blocks_sound_frame_is_foreign(tmp_path: Path) -> None:
    keys = prompt(1, 2)
    with opened(tmp_path) as tier:
        put(tier, keys)
        first, second = (int(slot) * SLOT_BYTES for slot in tier.slots_of(keys))
        with (tmp_path / "data").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), os.pread(file.fileno(), SLOT_BYTES, first), second)
        assert get(tier, keys) == [None, Reason.FOREIGN]
        assert tier.match(keys) == 1


@pytest.mark.parametrize("written", [512, PAGE, PAGE + 512, SLOT_BYTES - 512])
def test_a_torn_write_is_a_miss(tmp_path: Path, written: int) -> None:
    """A power cut may leave the first half of a slot new and the rest old, with the record of either."""
    old, new = prompt(1, 1), prompt(2, 1)
    with opened(tmp_path) as tier:
        put(tier, old)
        put(tier, new)
        sources = {keys.tobytes(): int(tier.slots_of(keys)[0]) * SLOT_BYTES for keys in (old, new)}
        with (tmp_path / "data").open("r+b", buffering=0) as file:
            part = os.pread(file.fileno(), written, sources[new.tobytes()])
            os.pwrite(file.fileno(), part, sources[old.tobytes()])
        assert get(tier, old)[0] in (Reason.CORRUPT, Reason.FOREIGN)
        assert get(tier, new) == [None]


def test_a_data_file_cut_short_is_missed_where_it_ends(tmp_path: Path) -> None:
    keys = prompt(1, 6)
    with opened(tmp_path) as tier:
        put(tier, keys)
        slots = tier.slots_of(keys).tolist()
        assert slots == sorted(slots)
        os.truncate(tmp_path / "data", slots[3] * SLOT_BYTES + PAGE)
        assert get(tier, keys) == [None] * 3 + [Reason.CORRUPT] * 3
    with opened(tmp_path) as tier:
        assert get(tier, keys[: tier.match(keys)]) == [None] * 3
        assert put(tier, keys) == [None] * 6


def test_a_table_cut_short_is_missed_where_it_ends(tmp_path: Path) -> None:
    keys = prompt(1, 6)
    with opened(tmp_path) as tier:
        put(tier, keys)
        slots = tier.slots_of(keys).tolist()
    os.truncate(tmp_path / "table", slots[4] * RECORD_BYTES + 17)
    with opened(tmp_path) as tier:
        assert get(tier, keys[: tier.match(keys)]) == [None] * 4


def test_input_errors_are_misses_open_the_breaker_and_pass(tmp_path: Path) -> None:
    now = [0.0]
    breaker = Breaker(threshold=3, cooldown_seconds=1.0, clock=lambda: now[0])
    prompts = [prompt(number, 1) for number in range(6)]
    with opened(tmp_path, breaker=breaker, threads=1) as tier:
        for keys in prompts:
            put(tier, keys)
        with replaced(tier._slots.fd, "/proc/self/mem"):  # reading address 0 is EIO
            for keys in prompts[:3]:
                assert get(tier, keys) == [Reason.IO_ERROR]
            assert tier.match(prompts[5]) == 0
            assert get(tier, prompts[5]) == put(tier, prompts[5]) == [Reason.BREAKER_OPEN]
            now[0] += 1.0
            assert tier.match(prompts[5]) == 1
            assert get(tier, prompts[5]) == [Reason.IO_ERROR]  # the probe
            now[0] += 1.9
            assert tier.match(prompts[5]) == 0
        now[0] += 0.2
        assert get(tier, prompts[5]) == [None]
        stats = tier.stats()
        assert (stats["io_error_total"], stats["breaker_open_total"]) == (4, 2)
        assert (stats["breaker_open"], stats["breaker_opened_total"]) == (0, 1)
        # An unreadable block is dropped, so that it is written anew elsewhere; not while everything fails.
        assert [tier.match(keys) for keys in prompts] == [0, 0, 1, 1, 1, 1]


def test_blocks_that_are_moved_together_fail_one_by_one(tmp_path: Path) -> None:
    """A run of neighbouring slots is read by one call; what is wrong with one block is not held against another."""
    keys = prompt(1, 6)
    with opened(tmp_path) as tier:
        put(tier, keys)
        slots = tier.slots_of(keys).tolist()
        assert slots == list(range(slots[0], slots[0] + 6))
        flip(tmp_path / "data", slots[1] * SLOT_BYTES + 100, 1)
        flip(tmp_path / "data", slots[4] * SLOT_BYTES + 5000, 1)
        assert get(tier, keys) == [None, Reason.CORRUPT, None, None, Reason.CORRUPT, None]
        put(tier, keys)
        with replaced(tier._slots.fd, "/proc/self/mem"):
            assert get(tier, keys) == [Reason.IO_ERROR] * 6


def test_output_errors_are_skipped_stores(tmp_path: Path) -> None:
    keys = prompt(1, 3)
    with opened(tmp_path, threads=1) as tier:
        with replaced(tier._slots.fd, "/proc/self/mem"):
            outcomes = put(tier, keys)
            assert outcomes[0] is Reason.IO_ERROR
            assert set(outcomes) <= {Reason.IO_ERROR, Reason.NO_PARENT}
        assert (tier.match(keys), tier.stats()["resident_blocks"]) == (0, 0)
        assert put(tier, keys) == [None] * 3
        assert get(tier, keys) == [None] * 3


def test_a_full_file_system_is_a_reason_and_no_reason_to_stop_reading(tmp_path: Path) -> None:
    held = prompt(0, 2)
    with opened(tmp_path, threads=1) as tier:
        put(tier, held)
        with replaced(tier._slots.fd, "/dev/full"):
            for number in range(1, 6):
                assert put(tier, prompt(number, 1)) == [Reason.NO_SPACE]
        assert tier.stats()["no_space_total"] == 5
        assert tier.stats()["breaker_open"] == 0
        assert get(tier, held) == [None] * 2


def test_a_record_that_cannot_be_emptied_keeps_its_slot_from_use(tmp_path: Path) -> None:
    held, keys = prompt(1, 3), prompt(2, 3)
    with opened(tmp_path, slots=3, threads=1) as tier:
        put(tier, held)
        with replaced(tier._directory.table_fd, "/dev/full"):
            assert put(tier, keys) == [Reason.NO_SPACE, Reason.NO_PARENT, Reason.NO_PARENT]
        assert tier.match(keys) == 0
        assert put(tier, keys) == [None] * 3
        assert tier._index.occupancy() == (0, 0, 3, 0)


def test_a_block_whose_record_cannot_be_written_is_not_acknowledged(tmp_path: Path) -> None:
    keys = prompt(2, 3)
    with opened(tmp_path, slots=3, threads=1) as tier:
        put(tier, prompt(1, 3))
        tier.remove(prompt(1, 3)[0])  # all records are empty now, so that only publishing writes
        with replaced(tier._directory.table_fd, "/dev/full"):
            assert put(tier, keys) == [Reason.NO_SPACE] * 3
        assert tier.match(keys) == 0
        assert tier._index.occupancy() == (3, 0, 0, 0)
        assert put(tier, keys) == [None] * 3


def test_a_failed_sync_is_never_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        put(tier, prompt(1, 1))
        reader, writer = os.pipe()  # fdatasync of a pipe is an error
        kept = os.dup(tier._slots.fd)
        os.dup2(writer, tier._slots.fd)
        assert not tier.sync(30)
        os.dup2(kept, tier._slots.fd)
        assert not tier.sync(30)
        for fd in (reader, writer, kept):
            os.close(fd)
    with opened(tmp_path) as tier:
        assert tier.sync(30)


def test_a_slow_sync_asked_for_again_leaves_workers_to_the_reads(tmp_path: Path) -> None:
    keys = prompt(1, 4)
    with opened(tmp_path, threads=2) as tier:
        put(tier, keys)
        released, sync, synced = Event(), tier._slots.sync, 0

        def slow() -> None:
            nonlocal synced
            synced += 1
            assert released.wait(60)
            sync()

        tier._slots.sync = slow  # type: ignore[method-assign]
        assert not any(tier.sync(0.01) for _ in range(4))
        assert get(tier, keys) == [None] * 4
        assert synced == 1
        released.set()
        assert tier.sync(30)
        assert synced >= 2  # one that began after it was asked for


def test_a_sync_that_fails_in_a_way_nobody_knows_is_not_the_last(tmp_path: Path) -> None:
    with opened(tmp_path, threads=1) as tier:
        sync, failed = tier._slots.sync, Event()

        def broken() -> None:
            failed.set()
            raise ArithmeticError

        tier._slots.sync = broken  # type: ignore[method-assign]
        assert not tier.sync(0.05)
        assert failed.wait(30)
        tier._slots.sync = sync  # type: ignore[method-assign]
        assert any(tier.sync(1.0) for _ in range(30))


class StuckDevice:
    """Holds up every read of a tier until it is released."""

    def __init__(self, tier: DiskTier) -> None:
        self.released = Event()
        tier._slots.read_run_blocks = 1
        self._read = tier._slots.read
        tier._slots.read = self.read  # type: ignore[method-assign]

    def read(self, slot: int, keys: list[bytes], rows: list[Octets]) -> list[Reason | None]:
        assert self.released.wait(60)
        return self._read(slot, keys, rows)


def test_a_stuck_device_blocks_nobody(tmp_path: Path) -> None:
    """Two workers hang in a read. Whatever is asked meanwhile is answered, and the breaker opens."""
    keys, rows = prompt(1, 6), filled(prompt(1, 6))
    with opened(tmp_path, threads=2, stuck_seconds=0.01) as tier:
        put(tier, keys)
        device = StuckDevice(tier)
        hanging = tier.read(keys, 0, Rows(rows.memory, rows.ids), deadline=soon(0.05))
        others = memory(2)
        for _ in range(3):
            waiting = tier.read(keys, 4, Rows(others, rows.ids[:2]), deadline=soon(0.05))
            assert set(waiting.result(30)) <= {Reason.TIMEOUT, Reason.BREAKER_OPEN}
        started = time.monotonic()
        assert tier.match(keys) == 0
        assert get(tier, keys) == [Reason.BREAKER_OPEN] * 6
        tier.touch(keys)
        assert tier.stats()["breaker_open"] == 1
        assert not tier.sync(0.01)
        assert time.monotonic() - started < 10
        assert not hanging.done()  # its first blocks may still come, so its rows are not given back
        device.released.set()
        assert hanging.result(30)[2:] == [Reason.TIMEOUT] * 4


def test_closing_a_stuck_tier_ends_in_time_and_keeps_the_lock(tmp_path: Path) -> None:
    keys, rows = prompt(1, 4), filled(prompt(1, 4))
    with opened(tmp_path, threads=1) as tier:
        put(tier, keys)
        device = StuckDevice(tier)
        hanging = tier.read(keys, 0, rows, deadline=soon())
        started = time.monotonic()
        tier.close(0.2)
        assert time.monotonic() - started < 10
        assert os.fstat(tier._slots.fd)  # still open: an I/O may come to it
        device.released.set()
        assert hanging.result(30)[1:] == [Reason.CLOSED] * 3


def test_a_write_that_ends_while_it_reserves_keeps_no_slot(tmp_path: Path) -> None:
    keys, old = prompt(1, 4), prompt(2, 4)
    with opened(tmp_path, slots=8, threads=1) as tier:
        put(tier, old)
        released, reserve = Event(), tier._machine.ledger.reserve

        def held(count: int) -> SlotIds:
            assert released.wait(60)
            return reserve(count)

        tier._machine.ledger.reserve = held  # type: ignore[method-assign]
        write = tier.write(keys, 0, filled(keys), namespace=namespace(), deadline=soon(0.2))
        assert write.result(30) == [Reason.TIMEOUT] * 4
        released.set()
        tier._machine.ledger.reserve = reserve  # type: ignore[method-assign]
        assert put(tier, keys) == [None] * 4  # behind whatever the other has left to do
        assert tier.sync(30)
        assert tier._index.occupancy().reserved == 0
        assert tier.match(old) == tier.match(keys) == 4


def test_closing_with_writes_in_the_queue_evicts_nothing(tmp_path: Path) -> None:
    keys, old = prompt(1, 8), prompt(2, 8)
    with opened(tmp_path, slots=8, threads=1) as tier:
        put(tier, old)
        released, expired = Event(), Event()

        def busy() -> None:
            assert released.wait(60)

        tier._workers.submit(busy, urgent=True)
        write = tier.write(keys, 0, filled(keys), namespace=namespace(), deadline=soon(60))
        submit, drain = tier._workers.submit, tier._flights.drain

        def seen(task: Callable[[], None], *, urgent: bool, times: int = 1) -> None:
            submit(task, urgent=urgent, times=times)
            if urgent:  # the write was given up, and is to be completed
                expired.set()

        def at_once(timeout: float) -> bool:
            tier._flights.drain = drain  # type: ignore[method-assign]
            return drain(0.0)

        tier._summer.stop(30)  # the write's first step is in the queue
        tier._workers.submit = seen  # type: ignore[method-assign]
        tier._flights.drain = at_once  # type: ignore[method-assign]
        closing = Thread(target=tier.close, args=(30.0,))
        closing.start()
        assert expired.wait(30)
        released.set()
        closing.join(60)
        assert write.result(30) == [Reason.CLOSED] * 8
    with opened(tmp_path, slots=8) as tier:
        assert tier.match(old) == 8


def test_an_unexpected_failure_in_a_worker_is_a_reason(tmp_path: Path) -> None:
    keys = prompt(1, 2)
    with opened(tmp_path, threads=1) as tier:
        put(tier, keys)
        tier._slots.read = lambda *_: 1 // 0  # type: ignore[method-assign,assignment]
        assert get(tier, keys) == [Reason.IO_ERROR] * 2
