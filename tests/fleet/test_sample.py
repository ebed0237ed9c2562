"""The 13 real messages of vLLM 0.32 (SmolLM2, blocks of 128 tokens): the exact state after each."""

from pathlib import Path

import msgspec
import pytest

from cairn.fleet.base import Source, Tier
from cairn.fleet.events import Decoder
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.recording import Message, Player, Recording
from cairn.fleet.separation import namespace_digest
from tests.fleet.holder import Holder

SAMPLE = Path(__file__).parents[1] / "data" / "vllm_kv_events.bin"
SOURCE = Source("", 0)

#: By message: events, blocks held afterwards, and how many of them begin a prompt.
EXPECTED = [
    (1, 16, 1),
    (1, 32, 2),
    (1, 48, 2),
    (1, 63, 2),
    (2, 13, 1),
    (1, 29, 2),
    (1, 45, 2),
    (1, 46, 2),
    (1, 62, 3),
    (1, 68, 3),
    (3, 70, 4),
    (1, 71, 4),
    (1, 70, 4),
]


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return list(Recording(SAMPLE))


def told(payload: bytes) -> list[dict[str, object]]:
    """The events, as plain msgpack has them: an oracle that knows nothing of the decoder."""
    return msgspec.msgpack.decode(payload)[1]


def test_the_state_after_each_message(messages: list[Message]) -> None:
    holder, metrics = Holder(), FleetMetrics()
    player, wanted = Player(holder, metrics), set[int]()
    assert [message.sequence for message in messages] == list(range(13))
    for message, (_, held, first) in zip(messages, EXPECTED, strict=True):
        player.play([message])
        for event in told(message.payload):
            if event["type"] == "AllBlocksCleared":
                wanted.clear()
            elif event["type"] == "BlockStored":
                wanted |= set(event["block_hashes"])
            else:
                wanted -= set(event["block_hashes"])
        blocks = holder.blocks[SOURCE]
        assert holder.hashes(SOURCE) == wanted == set(blocks)
        assert (len(blocks), sum(parent is None for parent, *_ in blocks.values())) == (held, first)
        # Every block hangs from one that is there, or was: a parent may be evicted before its child in vLLM.
    assert holder.drops == []
    assert metrics.fleet_skipped_events.value() == metrics.fleet_skipped_batches.value() == 0


def test_events_are_the_engines_words(messages: list[Message]) -> None:
    decoder = Decoder(FleetMetrics())
    for message, (count, *_) in zip(messages, EXPECTED, strict=True):
        batch = decoder.decode(message.payload)
        assert batch is not None
        assert (batch.rank, len(batch.events)) == (0, count)
        assert batch.time == msgspec.msgpack.decode(message.payload)[0]
        for event, wire in zip(batch.events, told(message.payload), strict=True):
            if wire["type"] == "AllBlocksCleared":
                continue
            assert (list(event.hashes), event.tier) == (wire["block_hashes"], Tier.VRAM)
            if wire["type"] == "BlockStored":
                assert list(event.tokens) == wire["token_ids"]
                assert (event.parent, event.block_tokens) == (wire["parent_block_hash"], 128)
                assert event.extra == ()


def test_the_salted_prompt_is_apart(messages: list[Message]) -> None:
    batch = Decoder(FleetMetrics()).decode(messages[10].payload)
    assert batch is not None
    namespaces = [event.namespace for event in batch.events if hasattr(event, "namespace")]
    assert namespaces == [namespace_digest(salt="tenant-a")]
    assert b"" != namespaces[0] != namespace_digest(salt="tenant-b")
