"""The engine over a remote tier: what one process stored another loads, and a store that fails costs no request."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cairn.engine import CacheEngine
from cairn.engine.task import TaskStatus
from cairn.errors import StorageError
from cairn.tier.remote import RemoteTier
from cairn.tier.remote.packing import TAIL_BYTES

from .pages import BLOCK, Pages, at_rest, make_engine, prompt, retrieved, stored

#: Four blocks of 256 bytes.
OBJECT = 1024


def shared(path: Path, dram_blocks: int = 64, **settings: Any) -> CacheEngine:
    remote = {"storage.remote.url": f"file://{path}/shared", "storage.remote.object_size": OBJECT}
    return make_engine(dram_blocks, **{**remote, "engine.planner": False, **settings})


def remote_of(engine: CacheEngine) -> RemoteTier:
    store: Any = engine._store
    tier = store._lower[-1]
    assert isinstance(tier, RemoteTier)
    return tier


def hits(engine: CacheEngine) -> Any:
    return engine.get_stats()["hit_tokens"]


@pytest.mark.parametrize("length", [BLOCK, 3 * BLOCK, 4 * BLOCK, 40, 150])
def test_another_engine_loads_what_one_has_stored(tmp_path: Path, length: int) -> None:
    tokens = prompt(1, length)
    whole = length // BLOCK * BLOCK
    with shared(tmp_path) as engine:
        assert stored(engine, tokens) == whole
        assert engine.flush(10)
    with shared(tmp_path) as engine:
        assert engine.lookup(tokens) == whole
        assert retrieved(engine, tokens) == whole
        assert hits(engine) == {"remote": whole}
        assert retrieved(engine, tokens) == whole
        assert hits(engine) == {"remote": whole, "dram": whole}
        at_rest(engine)


def test_dram_disk_and_remote_each_give_their_part(tmp_path: Path) -> None:
    tokens = prompt(2, 120)
    with shared(tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with shared(tmp_path, **{"storage.disk.path": str(tmp_path / "kv"), "storage.disk.size": 1 << 20}) as engine:
        stored(engine, tokens[:60])
        assert engine.flush(10)
    with shared(tmp_path, **{"storage.disk.path": str(tmp_path / "kv"), "storage.disk.size": 1 << 20}) as engine:
        assert retrieved(engine, tokens[:32]) == 32
        assert retrieved(engine, tokens) == 120
        assert hits(engine) == {"disk": 60, "dram": 32, "remote": 60}
        at_rest(engine)


def test_an_engine_that_does_not_come_up_gives_its_disk_back(tmp_path: Path) -> None:
    """What is shared is not mounted yet; once it is, the same process (a node's client asks it again) has its cache."""
    tokens, mount = prompt(4, 40), tmp_path / "shared"
    settings: dict[str, Any] = {"storage.disk.path": str(tmp_path / "kv"), "storage.disk.size": 1 << 20}
    mount.write_bytes(b"no directory")
    for _ in range(2):
        with pytest.raises(StorageError, match="must be a directory"):
            shared(tmp_path, **settings)
    mount.unlink()
    with shared(tmp_path, **settings) as engine:
        assert stored(engine, tokens) == 40
        assert engine.flush(10)
        assert retrieved(engine, tokens) == 40


def test_what_waits_for_a_store_is_bounded(tmp_path: Path) -> None:
    with shared(tmp_path, 4, **{"storage.remote.linger_s": 100}) as engine:
        assert [stored(engine, prompt(seed, 3 * BLOCK)) for seed in (1, 2)] == [3 * BLOCK] * 2
        assert engine.metrics.skipped_tokens.value(tier="remote", reason="backpressure") == 3 * BLOCK
        assert engine.get_stats()["tiers"]["remote"]["write_queue_blocks"] == 3  # type: ignore[index,call-overload]


def test_a_prompt_whose_end_was_evicted_before_its_turn_is_stored_once(tmp_path: Path) -> None:
    """What is left of it ends within an object, from whose beginning a write would begin again and again."""
    with shared(tmp_path, 8, **{"storage.remote.linger_s": 100, "storage.cpu.policy": "lru"}) as engine:
        assert [stored(engine, prompt(1, 6 * BLOCK)), stored(engine, prompt(2, 5 * BLOCK))] == [6 * BLOCK, 5 * BLOCK]
        assert engine.flush(30)
        assert engine.metrics.skipped_tokens.value(tier="remote", reason="evicted") == 3 * BLOCK
        assert engine.metrics.stored_tokens.value(tier="remote") == 3 * BLOCK
    with shared(tmp_path) as engine:
        assert retrieved(engine, prompt(1, 6 * BLOCK)) == 3 * BLOCK


def test_a_growing_prompt_is_stored_in_whole_objects(tmp_path: Path) -> None:
    """Block after block, as decoding makes them: what ends the prompt is stored once it grows no more."""
    tokens = prompt(3, 130)
    with shared(tmp_path, **{"storage.remote.linger_s": 0.2}) as engine:
        for end in range(20, 130, BLOCK):
            stored(engine, tokens[:end])
        assert engine.flush(10)
        stats = remote_of(engine).stats()
        assert 32 <= stats["written_blocks"] <= 32 + 2 * 3
    with shared(tmp_path) as engine:
        assert retrieved(engine, tokens) == 128


def test_a_lone_offer_is_written_without_a_flush(tmp_path: Path) -> None:
    tokens = prompt(4, 24)
    with shared(tmp_path, **{"storage.remote.linger_s": 0.05, "storage.disk.sync_interval_s": 0.05}) as engine:
        stored(engine, tokens)
        until(lambda: remote_of(engine).stats()["written_blocks"] == 6)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_write_back_waits_until_dram_fills_up(tmp_path: Path) -> None:
    lazy = {"storage.remote.write": "back", "storage.remote.linger_s": 0.01, "storage.disk.sync_interval_s": 0.01}
    with shared(tmp_path, 32, **lazy) as engine:
        stored(engine, prompt(5, 32))
        assert not any((tmp_path / "shared").rglob("*/*/*"))
        stored(engine, prompt(6, 80))
        until(lambda: remote_of(engine).stats()["written_blocks"] >= 8)
        stored(engine, prompt(7, 32))
    with shared(tmp_path) as engine:
        assert [retrieved(engine, prompt(seed, length)) for seed, length in ((5, 32), (6, 80), (7, 32))] == [32, 80, 32]


def test_a_store_that_is_only_read(tmp_path: Path) -> None:
    tokens = prompt(8, 32)
    with shared(tmp_path, **{"storage.remote.write": "off"}) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with shared(tmp_path) as engine:
        assert retrieved(engine, tokens) == 0


def test_prefetch_brings_up_and_a_match_waits_for_nobody(tmp_path: Path) -> None:
    tokens = prompt(9, 64)
    with shared(tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with shared(tmp_path) as engine:
        gate = threading.Event()
        exists = remote_of(engine)._store.exists

        def slow(names: Any, *, deadline: float) -> Any:
            gate.wait(10)
            return exists(names, deadline=deadline + 10)

        remote_of(engine)._store.exists = slow  # type: ignore[method-assign]
        begun = time.monotonic()
        task, mask = engine.get_match(tokens)
        assert not mask.any()
        assert time.monotonic() - begun < 8
        engine.cancel([task])
        gate.set()
        task = engine.prefetch_async(tokens)
        assert engine.wait([task])[task].status == TaskStatus.SUCCESS
        task, mask = engine.get_match(tokens)
        assert mask.all()
        engine.cancel([task])
        assert hits(engine) == {}
        assert retrieved(engine, tokens) == 64
        assert hits(engine) == {"dram": 64}


def test_a_lookup_that_takes_too_long_is_a_miss(tmp_path: Path) -> None:
    tokens = prompt(10, 64)
    with shared(tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with shared(tmp_path, **{"storage.remote.lookup_timeout_s": 0.1}) as engine:
        store: Any = remote_of(engine)._store
        gate, exists = threading.Event(), store.exists
        store.exists = lambda names, *, deadline: (gate.wait(10), exists(names, deadline=deadline + 10))[1]
        begun = time.monotonic()
        assert retrieved(engine, tokens) == 0
        assert time.monotonic() - begun < 8
        gate.set()
        until(lambda: engine.lookup(tokens) == 64)


def test_what_is_not_worth_a_lookup_is_not_asked_for(tmp_path: Path) -> None:
    with shared(tmp_path, **{"engine.planner": True}) as engine:
        tier = remote_of(engine)
        engine.lookup(prompt(11, 64))
        asked = tier.stats()["lookups_total"]
        assert asked == 1
        for tokens in (64, 128):
            engine.observe_prefill(tokens, 0, 1e-9 * tokens)
        engine.lookup(prompt(12, 64))
        assert tier.stats()["lookups_total"] == asked
        for _ in range(80):
            engine.observe_prefill(64, 0, 10.0)
            engine.observe_prefill(128, 0, 20.0)
        engine.lookup(prompt(13, 64))
        assert tier.stats()["lookups_total"] == asked + 1


def test_many_engines_share_a_store(tmp_path: Path) -> None:
    prompts = [np.concatenate([prompt(14, 40), prompt(20 + i, 30) + 2000]) for i in range(6)]
    engines = [shared(tmp_path, **{"storage.remote.linger_s": 0.01}) for _ in range(3)]
    try:

        def work(number: int) -> None:
            for tokens in prompts[number::3]:
                stored(engines[number], tokens)
            engines[number].flush(10)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        time_over = time.monotonic() + 10
        while any(engine.lookup(tokens) < 68 for engine in engines for tokens in prompts):
            assert time.monotonic() < time_over
            time.sleep(0.05)  # what was not there is asked about again after two seconds
        for engine in engines:
            assert [retrieved(engine, tokens) for tokens in prompts] == [68] * 6
    finally:
        for engine in engines:
            engine.close()


def test_pages_are_not_touched_by_what_is_corrupt(tmp_path: Path) -> None:
    tokens = prompt(15, 64)
    with shared(tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    for path in (tmp_path / "shared").rglob("*/*/*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[-TAIL_BYTES - 5] ^= 1  # of the last block
            path.write_bytes(data)
    with shared(tmp_path) as engine:
        pages = Pages(1)
        slots = pages.slots(64)
        pages.clear()
        mask = engine.retrieve(tokens, None, pages.tensors, slots)
        assert pages.holds(tokens, slots, mask)
        assert int(np.count_nonzero(mask)) == 12, "three blocks of the first object are right"
        assert engine.get_stats()["miss_tokens"] == {"corrupt": 52}
        at_rest(engine)
