"""The 13 real messages of vLLM 0.32 into the index: what is held of each prompt after each of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cairn.fleet import FleetIndex, Source, Tier
from cairn.fleet.recording import Message, Player, Recording
from cairn.fleet.separation import namespace_digest

from .test_model import check

SAMPLE = Path(__file__).parents[1] / "data" / "vllm_kv_events.bin"
SOURCE = Source("", 0)
BLOCK = 128

#: By prompt: the messages that stored it, one behind the other. The fourth begins as the first.
PARTS = {"first": [0], "second": [1, 2, 3], "third": [4], "fourth": [5, 6, 7], "fifth": [8, 9], "salted": [10, 11]}
SALTS = {"salted": "tenant-a"}

#: By message: blocks held of each prompt, in the order above, and of all together.
EXPECTED = [
    ((16, 0, 0, 16, 0, 0), 16),
    ((16, 16, 0, 16, 0, 0), 32),
    ((16, 32, 0, 16, 0, 0), 48),
    ((16, 47, 0, 16, 0, 0), 63),
    ((0, 0, 13, 0, 0, 0), 13),  # cleared before the third is stored
    ((16, 0, 13, 16, 0, 0), 29),
    ((16, 0, 13, 32, 0, 0), 45),
    ((16, 0, 13, 33, 0, 0), 46),
    ((16, 0, 13, 33, 16, 0), 62),
    ((16, 0, 13, 33, 22, 0), 68),
    ((16, 0, 11, 33, 22, 4), 70),  # its two last blocks are evicted to make room for the salted one
    ((16, 0, 11, 33, 22, 5), 71),  # filled in decode
    ((16, 0, 10, 33, 22, 5), 70),
]

Wire = Sequence[Mapping[str, Any]]


def chain(tokens: Sequence[int], before: bytes = b"") -> Iterator[bytes]:
    """What stands for each whole block and all that is before it."""
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        before = hashlib.sha256(before + repr(tokens[end - BLOCK : end]).encode()).digest()
        yield before


class Oracle:
    """By vLLM's hash: what it stands for, and under which salt."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[bytes, str | None]] = {}
        self.held: set[int] = set()

    def take(self, events: Wire) -> None:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
            elif event["type"] == "BlockRemoved":
                self.held -= set(event["block_hashes"])
            else:
                before, salt = self.known.get(event["parent_block_hash"], (b"", None))
                salt = (event["extra_keys"][0] or [salt])[0]
                for name, block in zip(event["block_hashes"], chain(event["token_ids"], before), strict=True):
                    self.known[name] = (block, salt)
                    self.held.add(name)

    def blocks(self, prompt: Sequence[int], salt: str | None) -> int:
        there, count = {self.known[name] for name in self.held}, 0
        for block in chain(prompt):
            if (block, salt) not in there:
                break
            count += 1
        return count


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return list(Recording(SAMPLE))


def wire(message: Message) -> Wire:
    return msgspec.msgpack.decode(message.payload)[1]


@pytest.fixture(scope="module")
def asked(messages: list[Message]) -> dict[str, list[int]]:
    """The prompts' tokens, put together from what was stored."""
    stored = [[token for event in wire(message) for token in event.get("token_ids", ())] for message in messages]
    prompts = {name: [token for part in parts for token in stored[part]] for name, parts in PARTS.items()}
    assert [len(prompt) // BLOCK for prompt in prompts.values()] == [16, 47, 13, 33, 22, 5]
    assert prompts["fourth"][: 16 * BLOCK] == prompts["first"]
    return prompts


def found(index: FleetIndex, prompt: Sequence[int], salt: str | None) -> int:
    """Blocks held, all in VRAM."""
    held = index.match(prompt, namespace=namespace_digest(salt=salt)).of(SOURCE)
    assert held == dict.fromkeys(Tier, 0) | {Tier.VRAM: held[Tier.VRAM]}
    assert held[Tier.VRAM] % BLOCK == 0
    return held[Tier.VRAM] // BLOCK


def test_what_is_held_after_each_message(messages: list[Message], asked: dict[str, list[int]]) -> None:
    index, oracle = FleetIndex(256), Oracle()
    player = Player(index)
    for message, (blocks, held) in zip(messages, EXPECTED, strict=True):
        player.play([message])
        oracle.take(wire(message))
        for (name, prompt), count in zip(asked.items(), blocks, strict=True):
            salt = SALTS.get(name)
            assert found(index, prompt, salt) == oracle.blocks(prompt, salt) == count, (message.sequence, name)
            assert found(index, [*prompt, 1, 2, 3] * 2, salt) == count
            assert found(index, prompt[:-1], salt) == min(count, len(prompt) // BLOCK - 1)
            for other in {None, "tenant-a", "tenant-b"} - {salt}:
                assert found(index, prompt, other) == oracle.blocks(prompt, other) == 0, (message.sequence, name, other)
        assert len(oracle.held) == held
        check(index)
        stats = index.stats()
        assert (stats.blocks, stats.worker_blocks, stats.sources) == (held, held, 1)
        assert not any(stats[5:])  # nothing evicted, nothing that could not be used


@pytest.mark.parametrize("lost", range(13))
def test_a_lost_message_is_missed(lost: int, messages: list[Message], asked: dict[str, list[int]]) -> None:
    """The source is dropped at the gap. What was stored before, or behind what was, is not held; all else is."""
    index, whole, rest = FleetIndex(), Oracle(), Oracle()
    Player(index).play([*messages[:lost], *messages[lost + 1 :]])
    last = lost == len(messages) - 1  # nothing shows that it is lost
    for message in messages:
        whole.take(wire(message))
    for message in messages[:lost] if last else messages[lost + 1 :]:
        rest.take([event for event in wire(message) if event.get("parent_block_hash") in {None, *rest.known}])
    for name, prompt in asked.items():
        kept = found(index, prompt, SALTS.get(name))
        assert kept == rest.blocks(prompt, SALTS.get(name))
        assert kept - whole.blocks(prompt, SALTS.get(name)) <= (last and name == "third")
