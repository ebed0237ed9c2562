"""Snapshots of the index: what is read equals what was written; what is not whole is a cold start."""

import io
import logging
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cairn.errors import LockedError, StorageError
from cairn.fleet import FleetIndex, Removed, Source, Tier
from cairn.fleet.copying import PIECE, Piece
from cairn.fleet.draft import draft
from cairn.fleet.metrics import FleetMetrics, WarmStarted
from cairn.fleet.positions import Position, WarmStart
from cairn.fleet.snapshot import read_snapshot, read_sources, write_snapshot, write_sources
from cairn.fleet.snapshot_format import (
    BLOCKS,
    END,
    KEPT,
    MAGIC,
    SOURCE,
    VERSION,
    VOID,
    Header,
    RecordWriter,
    SourceHead,
    scheme,
)

from .test_index import held, prompt, stored
from .test_model import check

A, B = Source("a", 0), Source("b", 1)


def small() -> FleetIndex:
    index = FleetIndex(64)
    index.apply(A, [stored(prompt(1, 6)), stored(prompt(2, 3), tier=Tier.DISK)])
    index.apply(B, [stored(prompt(1, 4)), stored(prompt(1, 6, 2), 2, tier=Tier.CPU)])
    return index


def bytes_of(index: FleetIndex) -> bytes:
    buffer = io.BytesIO()
    write_sources(index, index.sources(), buffer.write)
    return buffer.getvalue()


def loaded(data: bytes, **options: Any) -> tuple[FleetIndex, WarmStarted]:
    index = FleetIndex(64)
    warm = read_sources(io.BytesIO(data).read, index, **{"hold_back": False} | options)
    return index, warm.outcome


def test_what_was_written_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index, metrics = small(), FleetMetrics()
    written = write_snapshot(index, tmp_path / "fleet")
    assert (written.sources, written.worker_blocks, written.left_out) == (2, 19, 0)
    assert written.bytes == (tmp_path / "fleet").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["fleet"]
    other = FleetIndex(64)
    with caplog.at_level(logging.INFO, "cairn.fleet"):
        warm = read_snapshot(tmp_path / "fleet", other, hold_back=False, metrics=metrics)
    assert (warm.outcome, warm.worker_blocks) == (WarmStarted.WARM, 19)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert metrics.fleet_warm_starts.figures() == {"warm": 1}
    check(other)
    for tokens in (prompt(1, 6), prompt(2, 3), prompt(1, 6, 2)):
        assert [other.match(tokens).of(one) for one in (A, B)] == [index.match(tokens).of(one) for one in (A, B)]
    other.apply(A, [Removed(stored(prompt(1, 6)).hashes[4:], None, None), stored(prompt(3, 2))])  # names are there too
    assert [held(other, A, prompt(1, 6)), held(other, A, prompt(3, 2))] == [16, 8]


def test_what_is_held_back_counts_when_it_is_shown() -> None:
    index, position = small(), Position("a", "tcp://a", 5, bytes(32), {}, None)
    buffer = io.BytesIO()
    assert write_sources(index, index.sources(), buffer.write, lambda one: position if one == A else None)[:2] == (1, 1)
    other = FleetIndex(64)
    buffer.seek(0)
    warm = read_sources(buffer.read, other, hold_back=True)
    assert (warm.outcome, warm.sources, other.stats().worker_blocks) == (WarmStarted.WARM, 1, 9)
    assert other.match(prompt(1, 6)).sources == ()
    assert warm.take(("a", "elsewhere")) is None
    stand = warm.take(("a", "tcp://a"))
    assert stand is not None
    assert (stand.source, stand.position) == (A, position)
    other.show(A)
    assert held(other, A, prompt(1, 6)) == 24
    assert (warm.forget(), other.sources()) == (0, (A,))


def test_sources_without_a_position_are_not_held_back_for_good() -> None:
    index, outcome = loaded(bytes_of(small()), hold_back=True)
    assert (outcome, index.sources()) == (WarmStarted.WARM, ())


def test_of_two_sources_of_one_place_one_is_forgotten() -> None:
    """An engine came back as another rank, and a store still has the copies of both: one feed takes up one of them."""
    index, sources = FleetIndex(64), [Source("a", 0), Source("a", 1)]
    for source in sources:
        index.restore(source, (16,), 1, held_back=True)
    position = Position("a", "tcp://h:1", 3, bytes(32), {}, None)
    warm = WarmStart(index, WarmStarted.WARM, dict.fromkeys(sources, position))
    assert index.sources() == tuple(warm.stands) == (Source("a", 1),)
    warm.forget()
    assert index.sources() == ()


def test_an_index_with_less_room_takes_in_what_fits() -> None:
    index = FleetIndex()
    index.apply(A, [stored(prompt(1, 200))])
    other = FleetIndex(64, sources=1)
    assert read_sources(io.BytesIO(bytes_of(index)).read, other, hold_back=False).outcome is WarmStarted.WARM
    assert 0 < other.stats().worker_blocks <= 64
    check(other)


def test_large_sources_go_in_pieces() -> None:
    index = FleetIndex(1 << 18)
    index.apply(A, [stored(prompt(1, PIECE + 5000)), stored(prompt(1, 300), tier=Tier.CPU)])
    index.apply(B, [stored(prompt(1, 1000))])
    other = FleetIndex(1 << 18)
    read_sources(io.BytesIO(bytes_of(index)).read, other, hold_back=False)
    found, expected = other.match(prompt(1, PIECE + 5000)), index.match(prompt(1, PIECE + 5000))
    assert found.sources == expected.sources
    assert (found.tokens == expected.tokens).all()
    slots = other._ledger.blocks.records["key0"][:1000]
    assert (slots == index._ledger.blocks.records["key0"][:1000]).all()  # in a row, as they were


def test_every_flipped_byte_is_a_cold_start() -> None:
    data = bytes_of(small())
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            index, outcome = loaded(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            assert outcome is not WarmStarted.WARM, at
            assert index.stats()[:4] == (0, 0, 0, 0), at


def test_every_torn_end_is_a_cold_start() -> None:
    data = bytes_of(small())
    for size in range(len(data)):
        index, outcome = loaded(data[:size])
        assert (outcome, index.sources()) == (WarmStarted.TORN, ()), size
    assert loaded(data + b"\0")[1] is WarmStarted.CORRUPT


def resealed(**change: Any) -> bytes:
    from cairn.codec.seal import seal

    with_ = {"magic": MAGIC, "version": VERSION, "body": b""} | change
    return seal(with_["magic"], with_["version"], with_["body"])


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (b"", WarmStarted.TORN),
        (b"#!/bin/sh\necho this is quite another kind of file\n", WarmStarted.FOREIGN),
        (resealed(version=VERSION + 1), WarmStarted.NEWER),
        (resealed(version=VERSION - 1), WarmStarted.FOREIGN),
        (resealed(magic=b"CAIRNDIR"), WarmStarted.FOREIGN),
        (resealed(body=b"\x93\x01\x02\x03"), WarmStarted.CORRUPT),
    ],
)
def test_strangers_are_cold_starts(
    data: bytes, outcome: WarmStarted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fleet").write_bytes(data)
    index, metrics = FleetIndex(64), FleetMetrics()
    assert read_snapshot(tmp_path / "fleet", index, metrics=metrics).outcome is outcome
    assert metrics.fleet_warm_starts.figures() == {outcome: 1}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_file_and_no_permission_are_cold_starts(tmp_path: Path) -> None:
    assert read_snapshot(tmp_path / "none", FleetIndex(64)).outcome is WarmStarted.ABSENT
    assert read_snapshot(tmp_path, FleetIndex(64)).outcome is WarmStarted.UNREADABLE


def test_keys_made_otherwise_are_foreign() -> None:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer.write, Header(bytes(16), 0.0, 64, 64))
    writer.record(END, bytes(8))
    assert loaded(buffer.getvalue())[1] is WarmStarted.FOREIGN


HEAD = SourceHead("a", 0, (4,), 2, None)
ONE = Piece(np.array([1], np.uint64), np.array([[2, 3]], np.uint64), np.array([1], np.uint8))
Said = Callable[[RecordWriter], None]


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.mark.parametrize(
    "said",
    [
        lambda w: w.blocks(ONE),  # of nobody
        lambda w: w.record(KEPT, number(0)),
        lambda w: (w.source(HEAD), w.source(HEAD)),
        lambda w: (w.source(HEAD), w.record(KEPT, number(0)), w.source(HEAD), w.record(KEPT, number(0))),
        lambda w: (w.source(HEAD), w.blocks(ONE), w.record(KEPT, number(2))),
        lambda w: (w.source(HEAD), w.blocks(ONE), w.blocks(ONE), w.blocks(ONE), w.record(KEPT, number(3))),
        lambda w: (w.source(HEAD), w.blocks(ONE._replace(tiers=np.array([0], np.uint8)))),
        lambda w: (w.source(HEAD), w.blocks(ONE._replace(tiers=np.array([16], np.uint8)))),
        lambda w: (w.source(HEAD), w.record(BLOCKS, bytes(26))),
        lambda w: (w.source(HEAD), w.blocks(ONE)),
        lambda w: w.record(SOURCE, b"\x95\xa1a\x00\x91\x00\x02\xc0"),  # a block size of 0
        lambda w: w.record(SOURCE, b"\xc1"),
        lambda w: w.record(9, b""),
        lambda w: (w.source(HEAD), w.record(KEPT, number(0)), w.source(SourceHead("b", 0, (4,), 2, None))),
    ],
)
def test_what_makes_no_sense_is_a_cold_start_even_with_right_checksums(said: Said) -> None:
    buffer = io.BytesIO()
    writer = RecordWriter(buffer.write, Header(scheme(), 0.0, 64, 64))
    said(writer)
    writer.record(END, number(1))
    index, outcome = loaded(buffer.getvalue())
    assert (outcome, index.stats()[:4]) == (WarmStarted.CORRUPT, (0, 0, 0, 0))


def test_a_source_dropped_while_it_is_copied_is_void() -> None:
    index, buffer = small(), io.BytesIO()
    writer = RecordWriter(buffer.write, Header(scheme(), 0.0, 64, 64))
    writer.source(HEAD)
    writer.blocks(ONE)
    writer.record(VOID, number(1))
    writer.record(END, number(0))
    index, outcome = loaded(buffer.getvalue())
    assert (outcome, index.sources()) == (WarmStarted.WARM, ())


def test_beside_events_every_source_is_of_one_moment(tmp_path: Path) -> None:
    """Each source in turn stores eight blocks more of its prompt, or forgets the last eight."""
    index, tokens, done = FleetIndex(1 << 14), prompt(1, 4096), threading.Event()
    events = [stored(tokens[: 32 * (i + 1)], first=8 * i) for i in range(512)]
    sources = [Source("a", rank) for rank in range(8)]
    for source in sources:
        index.apply(source, events[:500])

    def ingest() -> None:
        turns = 0
        while not done.is_set():
            event = events[500 + turns // 2 % 12]
            for source in sources:
                index.apply(source, [event] if turns % 2 else [event, Removed(event.hashes, None, None)])
            if turns % 24 == 23:
                for source in sources:
                    index.apply(source, [Removed(one.hashes, None, None) for one in reversed(events[500:])])
            turns += 1

    thread = threading.Thread(target=ingest)
    thread.start()
    try:
        for _ in range(10):
            assert write_snapshot(index, tmp_path / "fleet").sources == 8
            other = FleetIndex(1 << 14)
            assert read_snapshot(tmp_path / "fleet", other, hold_back=False).outcome is WarmStarted.WARM
            check_lengths(other, tokens)
    finally:
        done.set()
        thread.join()
    check(index)
    assert index._ledger.copies == []


def check_lengths(index: FleetIndex, tokens: Any) -> None:
    found = index.match(tokens)
    assert len(found.sources) == 8
    for source in found.sources:
        blocks = sum(found.of(source).values()) // 4
        assert blocks >= 4000
        assert blocks % 8 == 0  # never half an event
        member = index._ledger.members[source]
        assert member.count == blocks  # and nothing behind it


def test_one_writer_at_a_time_and_nothing_left_of_one_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "fleet"
    with draft(path) as file:
        file.write(b"first")
        with pytest.raises(LockedError, match="another process"), draft(path):
            pass
    with pytest.raises(ZeroDivisionError):
        write_half(path)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("fleet", b"first")]
    with pytest.raises(StorageError, match="no/such"):
        write_snapshot(small(), tmp_path / "no/such")


def write_half(path: Path) -> None:
    with draft(path) as file:
        file.write(b"second")
        raise ZeroDivisionError


WRITER = """
import json, pathlib, sys
from cairn.fleet import FleetIndex, Source
from cairn.fleet.snapshot import write_snapshot
from tests.fleet.test_index import prompt, stored
index, turn = FleetIndex(1 << 16), 0
while True:
    for rank in range(4):
        index.apply(Source("a", rank), [stored(prompt(turn, 2048))])
    turn += 1
    write_snapshot(index, pathlib.Path(sys.argv[1]))
    if turn == 2:
        print(json.dumps(turn), flush=True)
"""


def size_of(path: Path) -> int:
    """0 too where it is gone again."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_killed_while_it_writes(tmp_path: Path) -> None:
    path, beside = tmp_path / "fleet", tmp_path / "fleet.new"
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 60)[0], "the writer does not start"
            while not size_of(beside):
                assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(20)
            process.stdout.close()
        index = FleetIndex(1 << 16)
        warm = read_snapshot(path, index, hold_back=False)
        assert warm.outcome is WarmStarted.WARM
        assert warm.worker_blocks % (4 * 2048) == 0
        check_ranks(index)
        if beside.exists():
            break
    assert beside.exists(), "never killed in the middle of a write: the test shows nothing"
    assert read_snapshot(beside, FleetIndex(8)).outcome in (WarmStarted.TORN, WarmStarted.WARM)  # warm: not renamed yet
    write_snapshot(index, path)
    assert [one.name for one in tmp_path.iterdir()] == ["fleet"]


def check_ranks(index: FleetIndex) -> None:
    assert [held(index, Source("a", rank), prompt(0, 2048)) for rank in range(4)] == [8192] * 4


def test_a_copy_is_of_its_moment_whatever_comes_before_it_is_read() -> None:
    index, tokens = FleetIndex(256), prompt(1, 40)
    event = stored(tokens)
    index.apply(A, [event])
    copy = index.copy(A)
    assert copy is not None
    assert index.cut(A, copy)
    names = event.hashes
    index.apply(A, [Removed(names[30:], None, None), stored(prompt(2, 20))])  # others take the records
    index.apply(A, [stored(tokens[:40], tier=Tier.DISK), Removed(names[20:25], Tier.VRAM, None)])
    index.apply(A, [stored(tokens[:80], seed=1)])  # second names
    index.apply(B, [stored(prompt(3, 60))])
    other = FleetIndex(256)
    assert other.restore(A, copy.sizes, copy.count, held_back=False)
    for piece in copy.pieces():
        assert piece.tiers.tolist() == [1] * 40
        other.fill(A, piece)
    copy.close()
    assert (held(other, A, tokens), other.stats().worker_blocks) == (160, 40)
    check(other)


def test_what_is_evicted_while_it_is_copied_is_left_out() -> None:
    index = FleetIndex(64)
    index.apply(A, [stored(prompt(1, 60))])
    copy = index.copy(A)
    assert copy is not None
    assert index.cut(A, copy)
    for seed in range(2, 12):
        index.apply(A, [stored(prompt(seed, 10))])  # in the records of what went
    left = {key for piece in copy.pieces() for key in piece.keys[:, 0].tolist()}
    copy.close()
    assert left < set(index.hashed(prompt(1, 60))[0].keys[:, 0].tolist())
