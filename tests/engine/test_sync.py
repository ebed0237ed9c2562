"""The synchronous face: what is stored comes back, what cannot be proved is a miss, nothing else is written."""

import logging
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.engine import CacheEngine
from cairn.errors import ClosedError, ConfigError, GeometryError, InputError, LockedError, StorageError
from cairn.kv import KVGeometry, Namespace

from .pages import BLOCK, GEOMETRY, SLOT, Pages, at_rest, make_engine, namespace, prompt, retrieved, stored


def test_what_was_stored_comes_back() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 30)
        assert stored(engine, tokens) == 28
        assert engine.lookup(tokens) == 28
        assert retrieved(engine, tokens) == 28
        assert stored(engine, tokens) == 0
        stats = engine.get_stats()
        assert stats["hit_tokens"] == {"dram": 28}
        assert stats["miss_tokens"] == {"partial_block": 2}
        at_rest(engine)


@settings(max_examples=60, deadline=None)
@given(shared=st.integers(0, 40), own=st.integers(0, 24), start=st.integers(0, 64), offset=st.integers(0, 64))
def test_masks_and_offsets(shared: int, own: int, start: int, offset: int) -> None:
    with make_engine(64) as engine:
        first = prompt(1, 40)
        second = np.concatenate([first[:shared], prompt(2, own) + 1000])
        stored(engine, first)
        start, offset = min(start, len(second)), min(offset, len(second))
        mask = np.arange(len(second)) >= start
        pages = Pages(3)
        slots = pages.slots(len(second))
        pages.clear()
        result = engine.retrieve(second, mask, pages.tensors, slots[offset:], offset)
        begin, held = max(start, offset), shared // BLOCK * BLOCK
        assert result.tolist() == [begin <= i < held for i in range(len(second))]
        assert pages.holds(second, slots, result)


def test_a_store_continues_where_the_last_one_ended() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 40)
        assert stored(engine, tokens[:18]) == 16
        assert stored(engine, tokens) == 24
        assert retrieved(engine, tokens) == 40


def test_a_store_behind_a_gap_is_skipped_and_counted() -> None:
    with make_engine(64) as engine:
        tokens, pages = prompt(0, 40), Pages()
        slots = pages.slots(40)
        assert engine.store(tokens, np.arange(40) >= 16, pages.tensors, slots) == 0
        assert engine.get_stats()["skipped_tokens"] == {"dram": {"no_parent": 24}}
        assert engine.lookup(tokens) == 0


def test_more_than_dram_holds() -> None:
    with make_engine(5) as engine:
        tokens = prompt(0, 40)
        assert stored(engine, tokens) == 20
        assert retrieved(engine, tokens) == 20
        assert stored(engine, prompt(1, 40)) == 20
        assert retrieved(engine, tokens) == 0
        at_rest(engine)


def test_requests_of_other_namespaces_never_meet() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 16)
        stored(engine, tokens)
        for other in (namespace(salt=b"x"), namespace(lora="a"), namespace(revision="2"), namespace(model="n")):
            assert engine.lookup(tokens, namespace=other) == 0
            assert retrieved(engine, tokens, namespace=other) == 0
        with pytest.raises(GeometryError):
            engine.lookup(tokens, namespace=Namespace(model="m", geometry=KVGeometry(layers=1, kv_heads=1, head_dim=8)))


def test_extra_content_separates_requests() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 16)
        pages = Pages()
        slots = pages.slots(16)
        pages.prefill(tokens, slots)
        engine.store(engine.chain(tokens, extra={1: b"image"}), None, pages.tensors, slots)
        assert engine.lookup(engine.chain(tokens, extra={1: b"image"})) == 16
        assert engine.lookup(engine.chain(tokens, extra={1: b"other"})) == 4
        assert engine.lookup(tokens) == 4


def test_the_disk_serves_what_dram_has_lost(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(16, tmp_path / "cache") as engine:
        stored(engine, tokens)
        assert engine.flush(10)
        stored(engine, prompt(1, 64))
        assert engine.flush(10)
        assert engine._store.match(engine.chain(tokens).keys).dram == 0
        assert retrieved(engine, tokens) == 64
        assert engine.get_stats()["hit_tokens"] == {"disk": 64}
        assert retrieved(engine, tokens) == 64
        assert engine.get_stats()["hit_tokens"] == {"disk": 64, "dram": 64}
        at_rest(engine)


def test_a_restart_is_warm(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(16, tmp_path) as engine:
        stored(engine, tokens)
    with make_engine(16, tmp_path) as engine:
        assert engine.lookup(tokens) == 64
        assert retrieved(engine, tokens[:50]) == 48
        assert engine.contains(engine.chain(tokens).key(3)) == 1
        assert engine.contains(bytes(16)) == -1


def test_a_part_in_dram_and_a_part_on_disk(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(64, tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with make_engine(64, tmp_path) as engine:
        assert retrieved(engine, tokens[:20]) == 20
        assert retrieved(engine, tokens) == 64
        assert engine.get_stats()["hit_tokens"] == {"disk": 20 + 44, "dram": 20}


def test_a_corrupt_frame_is_a_miss_from_there_on(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(64, tmp_path) as engine:
        stored(engine, tokens)
    data = next(path for path in tmp_path.iterdir() if path.name == "data")
    content = bytearray(data.read_bytes())
    needle = Pages()
    slots = np.arange(64)
    needle.prefill(tokens, slots)
    wanted = needle.tensors[0][0, 7].tobytes()
    at = content.index(wanted)
    content[at] ^= 1
    data.write_bytes(content)
    with make_engine(64, tmp_path) as engine:
        assert retrieved(engine, tokens) == 28
        assert engine.get_stats()["miss_tokens"] == {"corrupt": 36}
        assert engine.lookup(tokens) == 28
        stored(engine, tokens)
        assert retrieved(engine, tokens) == 64


def test_two_engines_cannot_own_one_directory(tmp_path: Path) -> None:
    with make_engine(4, tmp_path), pytest.raises(LockedError, match="in use by process"):
        make_engine(4, tmp_path)


def test_the_planner_leaves_to_prefill_what_it_does_faster(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(64) as engine:
        stored(engine, tokens)
        for n in (100, 1000):
            engine.observe_prefill(n, 0, n * 1e-12)
            engine.cost.observe_load("dram", n * 1000, float(n))
        assert retrieved(engine, tokens) == 0
        assert engine.get_stats()["miss_tokens"] == {"cheaper_to_recompute": 64}
    with make_engine(64, **{"engine.planner": False}) as engine:
        stored(engine, tokens)
        engine.observe_prefill(100, 0, 1e-12)
        engine.observe_prefill(1000, 0, 1e-12)
        assert retrieved(engine, tokens) == 64


def test_a_disk_slower_than_computing_is_not_written(tmp_path: Path) -> None:
    with make_engine(64, tmp_path) as engine:
        for n in (100, 1000):
            engine.observe_prefill(n, 0, n * 1e-9)
            engine.cost.observe_load("disk", n * 1000, n * 1.0)
        stored(engine, prompt(0, 32))
        assert engine.flush(10)
        assert engine.get_stats()["tiers"]["disk"]["resident_blocks"] == 0
        assert engine.get_stats()["skipped_tokens"]["disk"] == {"cheaper_to_recompute": 32}
        for n in (100, 1000):  # it was busy; now it is not
            for _ in range(8):
                engine.cost.observe_load("disk", n * 1000, n * 1e-9)
        stored(engine, prompt(1, 32))
        assert engine.flush(10)
        assert engine.get_stats()["tiers"]["disk"]["resident_blocks"] == 8
    with make_engine(64, tmp_path, **{"engine.planner": False}) as engine:
        engine.observe_prefill(100, 0, 1e-12)
        engine.observe_prefill(1000, 0, 1e-12)
        engine.cost.observe_load("disk", 1000, 1.0)
        engine.cost.observe_load("disk", 2000, 2.0)
        stored(engine, prompt(2, 32))
        assert engine.flush(10)
        assert engine.get_stats()["tiers"]["disk"]["resident_blocks"] == 16


def test_a_tier_that_was_slow_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cairn.engine.probe.INTERVAL_S", 0.0)
    with make_engine(8, tmp_path) as engine:
        prompts = [prompt(seed, 32) for seed in range(4)]
        for tokens in prompts:
            stored(engine, tokens)
            assert engine.flush(10)
        for n in (100, 1000):
            engine.observe_prefill(n, 0, n * 1.0)
            engine.cost.observe_load("disk", n * 1000, n * 1e3)
        for _ in range(1000):  # what is brought up pushes others out of DRAM, so there is always something below
            for tokens in prompts:
                retrieved(engine, tokens)
            if engine.get_stats()["hit_tokens"].get("disk"):
                break
        assert engine.get_stats()["hit_tokens"]["disk"] > 0
        assert engine.get_stats()["miss_tokens"]["cheaper_to_recompute"] > 0


def test_a_system_without_threads_costs_only_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_engine(8, tmp_path) as engine:
        for seed in range(4):
            stored(engine, prompt(seed, 32))
            assert engine.flush(10)
        for n in (100, 1000):
            engine.observe_prefill(n, 0, n * 1.0)
            engine.cost.observe_load("disk", n * 1000, n * 1e3)

        def refused(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refused)
        assert retrieved(engine, prompt(0, 32)) == 0
        monkeypatch.undo()
        at_rest(engine)


def test_results_speak_the_callers_language() -> None:
    torch = pytest.importorskip("torch")
    with make_engine(8) as engine:
        tokens, pages = prompt(0, 8), Pages()
        slots = pages.slots(8)
        engine.store(torch.tensor(tokens), None, pages.tensors, torch.tensor(slots))
        mask = engine.retrieve(torch.tensor(tokens), torch.ones(8, dtype=torch.bool), pages.tensors, slots)
        assert mask.dtype == torch.bool
        assert mask.all()
        assert isinstance(engine.retrieve(tokens, None, pages.tensors, slots), np.ndarray)


def test_bad_arguments_end_in_one_clear_line() -> None:
    with make_engine(8) as engine:
        tokens, pages = prompt(0, 8), Pages()
        slots = pages.slots(8)
        torn = np.where(np.arange(8) == 5, -1, slots)
        cases = [
            (lambda: engine.store(tokens, None, None, slots), "kvcaches is missing"),
            (lambda: engine.store(tokens, None, pages.tensors), "slot_mapping is missing"),
            (lambda: engine.store(tokens, None, pages.tensors, slots[:5]), r"slot_mapping of shape \(5,\)"),
            (lambda: engine.store(tokens, None, pages.tensors, slots + 256), "slot [0-9]+: the KV cache has slots"),
            (lambda: engine.store(tokens, None, pages.tensors, torn), "slot -1: a block is stored whole"),
            (lambda: engine.store(tokens, None, pages.tensors, slots, 9), "offset=9"),
            (lambda: engine.retrieve(tokens, np.ones(3, bool), pages.tensors, slots), r"mask of shape \(3,\)"),
            (lambda: engine.retrieve(tokens, tokens % 2 == 0, pages.tensors, slots), "mask: must be False"),
            (lambda: engine.lookup([[1]]), "one row of integers"),
            (lambda: engine.contains(b"short"), "key of 5 bytes"),
        ]
        for call, message in cases:
            with pytest.raises(InputError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
        at_rest(engine)
    with pytest.raises(ClosedError):
        engine.lookup(tokens)
    engine.close()


def test_tokens_without_a_slot_are_never_stored() -> None:
    """What the row of such a token held before, of another prompt, would be served as its KV."""
    tokens, pages = prompt(0, 10), Pages()
    slots = pages.slots(10)
    pages.prefill(tokens, slots)
    padded, torn = np.where(np.arange(10) < 8, slots, -1), np.where(np.arange(10) == 3, -1, slots)
    with make_engine(8) as engine:
        kv = engine.register_kv_caches(pages.tensors)
        layers = engine.store_layers(engine.chain(tokens))
        assert layers
        for layer, given in ((2, slots[:8]), (-1, slots[:8]), (0, torn[:8])):
            with pytest.raises(InputError, match=r"has layers 0\.\.1|slot -1"):
                layers.put(layer, kv, given)
        layers.abort()
        task, _ = engine.put_match(tokens)
        with pytest.raises(InputError, match="slot -1: a block is stored whole"):
            engine.launch([task], [torn])
        assert engine.lookup(tokens) == 0
        assert engine.store(tokens, None, pages.tensors, padded) == 8  # the unfinished block is not stored
        assert retrieved(engine, tokens) == 8
        engine.cancel([task])
        at_rest(engine)


def test_a_layer_that_cannot_be_copied_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device fails: the engine's step goes on, and nothing of it can be found."""

    def fails(*_: object) -> None:
        raise StorageError("injected")

    tokens, pages = prompt(0, 8), Pages()
    with make_engine(8) as engine:
        kv = engine.register_kv_caches(pages.tensors)
        layers = engine.store_layers(engine.chain(tokens))
        assert layers
        layers.put(0, kv, np.arange(8))
        with monkeypatch.context() as patch:
            patch.setattr(engine._copier, "gather", fails)
            layers.put(1, kv, np.arange(8))
        assert layers.commit() == 0
        assert engine.lookup(tokens) == 0
        assert engine.metrics.skipped_tokens.value(tier="dram", reason="io_error") == 8
        at_rest(engine)


def test_an_arena_of_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one KV block of 4096 bytes"):
        make_engine(1, **{"storage.cpu.size": SLOT - 1})


def test_an_arena_larger_than_any_memory_is_refused() -> None:
    with pytest.raises(StorageError, match=r"lower storage\.cpu\.size"):
        make_engine(1, **{"storage.cpu.size": 1 << 60})


@pytest.mark.parametrize("timeout", [math.inf, 1e300, -1.0])
def test_no_timeout_is_too_long_or_too_short(tmp_path: Path, timeout: float) -> None:
    """Locks refuse what they cannot count, and so did whoever had to wait."""
    tokens = prompt(0, 32)
    with make_engine(16, tmp_path) as engine:
        stored(engine, tokens)
        assert engine.flush(10)
    with make_engine(16, tmp_path) as engine:
        assert retrieved(engine, tokens, timeout=timeout) == (32 if timeout > 0 else 0)
        assert engine.flush(timeout) == (timeout > 0)
        task = engine.prefetch_async(tokens)
        assert engine.wait([task], timeout)[task].status in ("SUCCESS", "TIMEOUT" if timeout < 0 else "SUCCESS")
        with pytest.raises(InputError, match="timeout=nan: must be a number of seconds"):
            engine.retrieve(tokens, None, Pages().tensors, np.arange(32), timeout=math.nan)
        at_rest(engine)


def test_defaults_are_enough() -> None:
    with CacheEngine(Namespace(model="m", geometry=GEOMETRY)) as engine:
        assert stored(engine, prompt(0, 8)) == 8


def test_the_log_level_is_the_configured_one() -> None:
    with make_engine(4, **{"engine.log_level": "ERROR"}):
        assert logging.getLogger("cairn").level == logging.ERROR
    with make_engine(4):
        assert logging.getLogger("cairn").level == logging.WARNING
