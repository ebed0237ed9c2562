"""What the model does not say: eviction, bounds, counters, both forms of a prompt, and lookups beside ingestion."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from cairn.errors import InputError
from cairn.fleet import Cleared, FleetIndex, Removed, Source, Stored, Tier
from cairn.fleet.chains import root_of
from cairn.fleet.names import hashes_of
from cairn.kv import KeyChain

from .test_model import check

A, B = Source("a", 0), Source("b", 0)


def prompt(seed: int, blocks: int, size: int = 4) -> Any:
    return np.random.default_rng(seed).integers(0, 1 << 17, blocks * size).astype(np.uint32)


def stored(tokens: Any, size: int = 4, tier: Tier = Tier.VRAM, first: int = 0, seed: int = 0) -> Stored:
    """The blocks from `first` on; the hash of a block is made of its first and last token."""
    ends = zip(tokens[::size], tokens[size - 1 :: size], strict=True)
    names = [int(start) << 37 | int(last) << 20 | seed for start, last in ends]
    parent = names[first - 1] if first else None
    return Stored(tuple(names[first:]), parent, tokens[first * size :].tolist(), size, tier, b"", ())


def held(index: FleetIndex, source: Source, tokens: Any) -> int:
    return sum(index.match(tokens).of(source).values())


def test_sources_of_different_block_sizes_are_both_scored_in_tokens() -> None:
    index, tokens = FleetIndex(), prompt(1, 64)  # 256 tokens
    index.apply(A, [stored(tokens, 16)])
    index.apply(B, [stored(tokens, 128)])
    longer = np.concatenate([tokens, prompt(2, 1)])
    assert [held(index, A, longer), held(index, B, longer)] == [256, 256]
    assert [held(index, A, longer[:250]), held(index, B, longer[:250])] == [240, 128]


def test_a_tier_that_goes_on_where_another_ends() -> None:
    index, tokens = FleetIndex(), prompt(1, 10)
    index.apply(A, [stored(tokens[:24])])
    index.apply(A, [stored(tokens, tier=Tier.DISK, first=4)])
    found = index.match(tokens)
    assert found.of(A) == {Tier.VRAM: 24, Tier.CPU: 0, Tier.DISK: 16, Tier.REMOTE: 0}
    assert found.tokens[0].tolist() == [24, 0, 0, 0]
    assert found.reach[0].tolist() == [24, 24, 40, 40]
    assert found.of(B) == dict.fromkeys(Tier, 0)


def test_a_chain_finds_what_its_tokens_find() -> None:
    index, tokens = FleetIndex(), prompt(1, 300)
    index.apply(A, [stored(tokens)])
    assert held(index, A, KeyChain(root_of(b""), 4, tokens)) == 1200
    assert held(index, A, index.hashed(tokens)) == 1200
    assert held(index, A, KeyChain(root_of(b""), 8, tokens)) == 0
    assert held(index, A, index.hashed(tokens, b"salt")) == 0
    with pytest.raises(InputError):
        index.match([-1])


@pytest.mark.parametrize("capacity", [16, 100, 1 << 12])
def test_keys_from_records_are_the_chain_s(capacity: int) -> None:
    """What is read off the index's blocks, held, evicted or overwritten, equals what is hashed."""
    index = FleetIndex(capacity)
    for turn, seed in enumerate((1, 2, 1, 3, 1, 2)):
        for namespace in (bytes(16), bytes(range(16))):
            tokens = np.concatenate([prompt(seed % 2, 40), prompt(seed, 100)])
            names = tuple(range(140 * seed, 140 * seed + 140))
            index.apply(A, [Stored(names, None, tokens.tolist(), 4, Tier.VRAM, namespace, ())])
            if turn % 2:
                index.apply(A, [Removed(names[seed * 20 :: 2], None, None)])
            (found,) = index.hashed(tokens, namespace)
            assert (found.keys == KeyChain(namespace, 4, tokens).keys).all()
            assert (index.hashed(tokens[::-1], namespace)[0].keys == KeyChain(namespace, 4, tokens[::-1]).keys).all()


def test_a_restored_block_learns_its_link_when_it_is_asked_for() -> None:
    index, other, tokens = FleetIndex(), FleetIndex(), prompt(1, 300)
    index.apply(A, [stored(tokens)])
    copy = index.copy(A)
    assert copy is not None
    assert index.cut(A, copy)
    assert other.restore(A, copy.sizes, copy.count, held_back=False)
    for piece in copy.pieces():
        other.fill(A, piece)
    records = other._ledger.blocks.records
    assert not records["link"].any()
    for _ in range(2):
        assert (other.hashed(tokens)[0].keys == KeyChain(root_of(b""), 4, tokens).keys).all()
        assert np.count_nonzero(records["link"]) == 300


def test_hashes_in_every_form() -> None:
    number = 0x0123456789ABCDEF
    whole = bytes(24) + number.to_bytes(8, "big")
    for form in (number, number | 5 << 64, whole, number - (1 << 64)):
        for beside in ((), (1,), (b"long enough",), (b"short",), (-1,)):
            found = hashes_of((form, *beside))
            assert found is not None
            assert int(found[0]) == number
    assert hashes_of((None,)) is None  # type: ignore[arg-type]


def test_what_cannot_be_used_is_counted() -> None:
    index, tokens = FleetIndex(sources=1), prompt(1, 10)
    index.apply(A, [stored(tokens, first=5)])
    assert index.stats().orphans == 5
    broken = stored(tokens)
    for change in ({"block_tokens": 3}, {"block_tokens": 0}, {"extra": (b"",)}, {"hashes": (None,) * 10}):
        fields = {name: getattr(broken, name) for name in broken.__struct_fields__}
        index.apply(A, [Stored(**{**fields, **change})])
    index.apply(
        A, [Stored((1,), None, [1 << 32], 1, Tier.VRAM, b"", ()), Stored((1,), None, [-1], 1, Tier.CPU, b"", ())]
    )
    assert index.stats().malformed == 42
    index.apply(A, [Removed((1, 2), None, None), Stored((1,), None, [], 0, Tier.CPU, b"", ())])
    assert index.stats().unknown == 3
    index.apply(A, [stored(tokens), stored(tokens, seed=1)])
    assert index.stats().doubles == 10
    index.apply(B, [stored(tokens)])  # a source too many
    assert (index.stats().malformed, index.stats().sources) == (52, 1)
    index.apply(A, [Cleared()])
    index.apply(B, [stored(tokens)])
    assert held(index, B, tokens) == 40


def test_one_block_has_one_name() -> None:
    """A second name is not taken; what it meant before is held no more, and the first name still ends the block."""
    index, first, second = FleetIndex(), prompt(1, 1), prompt(2, 1)

    def tell(name: int, tokens: Any) -> list[int]:
        index.apply(A, [Stored((name,), None, tokens, 4, Tier.VRAM, b"", ())])
        check(index)
        return [held(index, A, first), held(index, A, second)]

    assert tell(1, first) == [4, 0]
    assert tell(2, second) == [4, 4]
    assert tell(2, first) == [4, 0]
    index.apply(A, [Removed((2,), None, None)])
    assert held(index, A, first) == 4
    assert tell(1, second) == [0, 4]
    index.apply(A, [Removed((1,), None, None)])
    assert index.stats()[:3] == (0, 0, 0)


def test_block_sizes_are_bounded() -> None:
    index = FleetIndex()
    index.apply(A, [stored(prompt(size, 2, size), size) for size in range(1, 10)])
    assert [held(index, A, prompt(size, 2, size)) for size in (8, 9)] == [16, 0]


def test_the_oldest_go_but_not_what_is_asked_for() -> None:
    index = FleetIndex(64)
    prompts = [prompt(seed, 4) for seed in range(16)]
    for tokens in prompts:
        index.apply(A, [stored(tokens)])
    assert index.stats().blocks == 64
    index.match(prompts[0])
    index.apply(A, [stored(prompt(99, 4))])
    assert [held(index, A, tokens) for tokens in prompts[:4]] == [16, 0, 16, 16]
    assert (index.stats().evicted, index.stats().blocks) == (4, 64)
    index.apply(A, [stored(prompts[1], first=2)])  # its parent is forgotten
    assert index.stats().orphans == 2
    check(index)


def test_worker_blocks_are_bounded() -> None:
    index, tokens = FleetIndex(worker_blocks=100), prompt(1, 30)
    for rank in range(10):
        index.apply(Source("a", rank), [stored(tokens)])
        assert index.stats().worker_blocks <= 100
        assert held(index, Source("a", rank), tokens) > 0 or index.stats().evicted
    assert index.stats().evicted
    check(index)


def test_memory_follows_what_is_held() -> None:
    index, tokens = FleetIndex(1 << 14), prompt(1, 8192)
    for worker in range(64):
        index.apply(Source(f"w{worker}", 0), [stored(tokens)])
    full = index.stats()
    assert full.worker_blocks == 64 * 8192
    assert full.bytes <= 22 * full.worker_blocks
    for worker in range(64):
        index.drop(f"w{worker}")
    assert index.stats()[:4] == (0, 0, 0, 0)
    assert index.stats().bytes < full.bytes / 5


def test_a_thousand_sources_with_blocks_of_their_own() -> None:
    index = FleetIndex()
    for worker in range(1000):
        index.apply(Source(f"w{worker}", 0), [stored(prompt(worker, 64))])
    stats = index.stats()
    assert (stats.blocks, stats.sets) == (64_000, 1000)
    assert stats.bytes <= 120 * stats.worker_blocks
    assert [held(index, Source(f"w{worker}", 0), prompt(worker, 64)) for worker in (0, 63, 64, 999)] == [256] * 4


def test_lookups_beside_ingestion_find_what_is_not_touched() -> None:
    """One thread stores, removes, clears and makes the index grow and evict; the others always find what stays."""
    index, stays = FleetIndex(1 << 13), prompt(0, 512)
    index.apply(A, [stored(stays)])
    done, failures, waits = threading.Event(), [], []

    def ingest() -> None:
        for turn in range(300):
            source = Source(f"w{turn % 150}", 0)
            tokens = np.concatenate([stays[:1024], prompt(turn, 256)])
            whole = stored(tokens)
            index.apply(source, [whole, Removed(whole.hashes[turn % 7 :: 2], None, None)])
            if turn % 3 == 0:
                index.drop(source)
        done.set()

    def ask() -> None:
        while not done.is_set():
            start = time.perf_counter()
            found = held(index, A, stays)
            waits.append(time.perf_counter() - start)
            if found != 2048:
                failures.append(found)

    index.match(stays)
    threads = [threading.Thread(target=target) for target in (ingest, ask, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(waits) >= 20  # a reader that starves is seen here
    check(index)


@pytest.mark.parametrize("held_blocks", [0, 1, 511, 512, 513, 4607, 4608, 4609, 6000])
def test_a_prompt_is_hashed_as_far_as_it_is_held(held_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    index, tokens, hashed = FleetIndex(1 << 14), prompt(1, 6000), []
    index.apply(B, [stored(prompt(2, 1))])
    if held_blocks:
        index.apply(A, [stored(tokens[: 4 * held_blocks])])
    plain = index._ledger.follow

    def counted(chain: Any, rows: Any, first: int, seed: Any, most: int) -> int:
        hashed.append(plain(chain, rows, first, seed, most) - first)
        return first + hashed[-1]

    monkeypatch.setattr(index._ledger, "follow", counted)
    assert held(index, A, tokens) == 4 * held_blocks
    # The first is not behind a record; all others that are held are known.
    beyond = 512 + held_blocks - (held_blocks > 0)
    assert sum(hashed) == min(6000, beyond)
    assert held(index, A, index.hashed(tokens)) == 4 * held_blocks
