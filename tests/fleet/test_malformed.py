"""A live subscriber and its index under messages that are none: each is counted and skipped, memory stays bounded, and
the sound ones between them are all taken in.
"""

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cairn.fleet import FleetIndex, Tier
from cairn.fleet.instances import Limits
from cairn.fleet.metrics import Resync, Skip
from cairn.fleet.subscriber import Subscriber
from cairn.fleet.wire import MAX_PAYLOAD
from tests.fleet.peers import LIMITS, Publisher, until
from tests.fleet.wire_events import encode, removed, stored

MEBI = 1 << 20


class Line:
    """A publisher and an index that follows it. Sound batches store blocks 1, 2, ... of four tokens each."""

    def __init__(self, publisher: Publisher, subscriber: Subscriber, index: FleetIndex) -> None:
        self.publisher, self.metrics, self.index = publisher, subscriber.metrics, index

    async def sound(self) -> None:
        """One more, and it arrives."""
        self.publisher.publish()
        await until(lambda: self.has(self.publisher.made), "a sound batch")

    async def flowing(self) -> None:
        """Batches arrive again. What was sent before the new subscription reached the publisher is lost."""

        def arrived() -> bool:
            if self.has(self.publisher.made):
                return True
            self.publisher.publish()
            return False

        await until(arrived, "any sound batch")

    def has(self, block: int) -> bool:
        return self.index.match([block, 1, 2, 3]).of(self.publisher.source)[Tier.VRAM] == 4

    def skipped(self) -> dict[str, float]:
        batches, events = self.metrics.fleet_skipped_batches, self.metrics.fleet_skipped_events
        counts = {reason: batches.value(reason=reason) + events.value(reason=reason) for reason in Skip}
        return {reason: count for reason, count in counts.items() if count}


def following(body: Callable[[Line], Awaitable[None]], limits: Limits = LIMITS, *, whole: bool = True) -> None:
    """whole: in the end all that is sound must be there: nothing was dropped, or it was had again."""

    async def run(publisher: Publisher) -> None:
        index = FleetIndex(4096)
        async with Subscriber(index, [publisher.instance], limits=limits) as subscriber:
            line = Line(publisher, subscriber, index)
            await line.sound()
            await body(line)
            if whole:
                assert all(line.has(block) for block in range(1, publisher.made + 1))
                assert index.stats().blocks == publisher.made

    with Publisher() as publisher:
        publisher.publish()
        asyncio.run(run(publisher))


def wrong_types() -> list[Any]:
    """Events that no engine writes; ten blocks of them would be a store."""
    good = stored([90], [1, 2, 3, 4], 4)
    changes: list[dict[str, Any]] = [
        {"block_hashes": 5},
        {"block_hashes": [None]},
        {"block_hashes": [b""]},
        {"block_hashes": [b"x" * 65]},
        {"block_size": -1},
        {"block_size": 1 << 24},
        {"block_size": "4"},
        {"token_ids": {"a": 1}},
        {"token_ids": [1, 2, 3, "4"]},
        {"token_ids": [1, 2, 3, 1 << 32]},
        {"parent_block_hash": []},
        {"medium": 7},
        {"group_idx": 256},
        {"lora_name": "x" * 1025},
    ]
    return [good | change for change in changes] + [
        {"type": "New"},
        {"type": 3},
        {},
        [],
        "BlockStored",
        None,
        1.5,
        [[[]]],
    ]


def test_frames_that_are_no_message() -> None:
    frames = [[], [b""], [b"kv", b"8 bytes!"], [b"kv", b"short", b"x"], [b"kv", b"9 bytes!!", b"x"], [b"x"] * 4]
    frames += [[b""] * 500, [b"kv", b"", encode([stored([9], [9], 1)])]]
    frames += [[b"kv", b"\xff" * 8, encode([stored([9], [9], 1)])]]

    async def body(line: Line) -> None:
        for made in frames[1:]:
            line.publisher.do("raw", frames=[base64.b64encode(frame).decode() for frame in made])
            await line.sound()
        assert line.skipped() == {Skip.FRAMES: len(frames) - 1}
        assert line.metrics.fleet_drops.value() == 0

    following(body)


def test_payloads_that_are_no_batch() -> None:
    chance = random.Random(1)
    whole = encode([stored(list(range(1000, 1040)), list(range(70_000, 70_160)), 4), removed([1])])
    payloads = [b"", b"\xc1", b"\x93\x01" + b"\x91" * 200_000, b"\x91" * 200_000, b"\x81" * 200_000]
    payloads += [whole[: chance.randrange(1, len(whole))] for _ in range(30)]
    payloads += [b"\xc1" + chance.randbytes(chance.randrange(300)) for _ in range(30)]
    payloads += [
        msgspec.msgpack.encode(value) for value in ({}, [], [1.5], ["now", [], 0], [1.5, {}, 0], [1.5, [], -1])
    ]
    payloads += [b"\x93\x01" + claim + b"\xff" * 5 for claim in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")]

    async def body(line: Line) -> None:
        for payload in payloads:
            line.publisher.send(payload)
            line.publisher.publish()
        await line.sound()
        assert line.skipped() == {Skip.NOT_A_BATCH: len(payloads)}
        assert line.metrics.fleet_drops.value() == 0

    following(body)


def test_events_of_wrong_types() -> None:
    events = wrong_types()

    async def body(line: Line) -> None:
        for event in events:
            line.publisher.publish(line.publisher.block(), event, line.publisher.block())
        line.publisher.publish(line.publisher.block(), *events)
        await line.sound()
        skipped = line.skipped()
        assert sum(skipped.values()) == 2 * len(events)
        assert set(skipped) == {Skip.MALFORMED, Skip.UNKNOWN_TAG}
        assert line.metrics.fleet_drops.value() == 0

    following(body)


def test_random_bytes_at_random() -> None:
    """In order, out of it, and as frames; what they say is anything, so the sum is all that can be told."""
    chance = random.Random(2)

    async def body(line: Line) -> None:
        for _ in range(150):
            noise = chance.randbytes(chance.randrange(1, 80))
            if chance.random() < 0.5:
                line.publisher.send(noise)
            else:
                parts = [noise[at : at + 8] for at in range(0, len(noise), 8)]
                line.publisher.do("raw", frames=[base64.b64encode(part).decode() for part in parts])
            line.publisher.publish()
        await line.sound()
        await until(lambda: sum(line.skipped().values()) == 150, "all of them counted")
        assert line.metrics.fleet_drops.value() == 0

    following(body)


def test_the_largest_payloads_take_memory_one_at_a_time() -> None:
    size = MAX_PAYLOAD - 1024

    async def body(line: Line) -> None:
        line.publisher.do("huge", size=size)
        line.publisher.batches.append(b"")
        await line.sound()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(8):
            line.publisher.do("huge", size=size)
            line.publisher.batches.append(b"")
            await line.sound()
        assert line.skipped() == {Skip.NOT_A_BATCH: 9}
        assert resident("VmHWM") - before < 4 * MAX_PAYLOAD

    # The publisher may not answer a replay while it is read: it has 100 MB to send.
    following(body, Limits(check_s=60))


@pytest.mark.parametrize("kept", [True, False])
def test_more_than_a_message_may_have(kept: bool) -> None:
    """ZeroMQ cuts the connection, and the replay's too if it has it still. What came before is lost, and no more."""

    async def body(line: Line) -> None:
        line.publisher.do("huge", size=MAX_PAYLOAD + 1)
        if not kept:
            line.publisher.do("forget")
        line.publisher.publish()
        await until(lambda: line.metrics.fleet_connects.value() > 1, "a new connection")
        await line.flowing()
        await line.sound()
        assert line.has(line.publisher.made - 1)
        assert line.metrics.fleet_drops.value(reason=Resync.GAP) >= 1

    following(body, whole=False)


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))
