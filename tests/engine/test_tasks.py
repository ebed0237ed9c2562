"""The asynchronous face: statuses, deadlines, cancellation, leases; slots are never touched after `wait`."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cairn.copy import Copier, Progress
from cairn.engine import CacheEngine, LayerLoad, TaskStatus
from cairn.errors import ClosedError, InputError

from .gate import Gate
from .pages import Pages, at_rest, make_engine, prompt, stored


def registered(engine: CacheEngine, tokens: npt.NDArray[np.int64]) -> tuple[Pages, npt.NDArray[np.int64]]:
    """A cleared paged cache that the engine knows, and slots for a prompt."""
    pages = Pages(7)
    pages.clear()
    engine.register_kv_caches(pages.tensors)
    return pages, pages.slots(len(tokens))


def gated(engine: CacheEngine, tokens: npt.NDArray[np.int64]) -> Gate:
    """The prompt on disk only, and the disk behind a gate."""
    stored(engine, tokens)
    assert engine.flush(10)
    stored(engine, prompt(99, 64))
    assert engine.flush(10)
    assert engine._store.match(engine.chain(tokens).keys).dram == 0
    return Gate(engine)


def test_put_then_get() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 30)
        pages, slots = registered(engine, tokens)
        pages.prefill(tokens, slots)
        put = engine.put_async(tokens, slots)
        result = engine.wait([put])[put]
        assert result.status is TaskStatus.SUCCESS
        assert result.mask.tolist() == [True] * 28 + [False] * 2
        pages.clear()
        get = engine.get_async(tokens, slots)
        result = engine.wait([get])[get]
        assert result.status is TaskStatus.SUCCESS
        assert pages.holds(tokens, slots, result.mask)
        assert engine.wait([get])[get].status is TaskStatus.NOTFOUND
        again, mask = engine.put_match(tokens)
        assert not mask.any()
        engine.cancel([again])
        at_rest(engine)


def test_match_then_launch_as_a_batch() -> None:
    with make_engine(64) as engine:
        prompts = [prompt(seed, 24) for seed in range(3)]
        for tokens in prompts:
            stored(engine, tokens)
        pages, _ = registered(engine, prompts[0])
        places = np.random.default_rng(0).permutation(256)[:72].reshape(3, 24)
        matches = [engine.get_match(tokens) for tokens in prompts]
        assert all(mask.all() for _, mask in matches)
        ids = [task for task, _ in matches]
        assert {r.status for r in engine.try_wait(ids).values()} == {TaskStatus.UNREADY}
        assert {r.status for r in engine.wait(ids).values()} == {TaskStatus.UNREADY}
        engine.launch(ids, list(places), as_batch=True)
        assert {r.status for r in engine.wait(ids).values()} == {TaskStatus.SUCCESS}
        for tokens, slots in zip(prompts, places, strict=True):
            alone = Pages()
            alone.clear()
            alone.prefill(tokens, slots)
            for mine, theirs in zip(pages.tensors, alone.tensors, strict=True):
                a, b = (t.reshape(2, 256, -1)[:, slots] for t in (mine, theirs))
                assert (a == b).all()


def test_layer_by_layer() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        pages, slots = registered(engine, tokens)
        task, _ = engine.get_match(tokens)
        engine.launch([task], [slots], layerwise_transfer=True)
        assert [engine.wait_layer(task, layer) for layer in range(2)] == [True, True]
        assert pages.holds(tokens, slots, engine.wait([task])[task].mask)
        assert [layer["waits"] for layer in engine.layer_times.stats()["layers"]] == [1, 1], "the model's waits alone"
        at_rest(engine)


def test_who_waits_for_a_layer_of_a_cancelled_task_is_told_at_once() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        _, slots = registered(engine, tokens)
        gate = Event()
        for _ in range(4):  # all workers are busy
            engine._workers.submit(gate.wait, 60)
        task, _ = engine.get_match(tokens)
        engine.launch([task], [slots], layerwise_transfer=True)
        engine.cancel([task])
        started = time.monotonic()
        assert not engine.wait_layer(task, 0, timeout=20)
        assert time.monotonic() - started < 10
        gate.set()
        assert engine.wait([task])[task].status is TaskStatus.CANCELLED
        at_rest(engine)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_the_model_has_not_is_told(layer: int) -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        _, slots = registered(engine, tokens)
        task, _ = engine.get_match(tokens)
        engine.launch([task], [slots], layerwise_transfer=True)
        with pytest.raises(InputError, match=r"the model has layers 0\.\.1"):
            engine.wait_layer(task, layer)
        assert engine.wait([task])[task].status is TaskStatus.SUCCESS
        at_rest(engine)


def test_a_layer_whose_copy_fails_ends_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a copier raises: who waits for the task, for however long, is told."""
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        _, slots = registered(engine, tokens)

        def broken(*_: object) -> None:
            raise RuntimeError("injected")

        monkeypatch.setattr(engine._copier, "scatter_layers", broken)
        task, _ = engine.get_match(tokens)
        engine.launch([task], [slots], layerwise_transfer=True)
        assert not engine.wait_layer(task, 0)
        assert engine._tasks[task].future.result(30).status is TaskStatus.FAILED
        assert not engine.wait([task])[task].mask.any()
        at_rest(engine)


def held_back(engine: CacheEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Event, list[range | None]]:
    """Copies into the paged cache wait: set when the first has come; to be set to let them go; layers of those made."""
    begun, go, copied, scatter = Event(), Event(), list[range | None](), engine._copier.scatter

    def late(*arguments: Any) -> None:
        begun.set()
        go.wait(60)
        scatter(*arguments)
        copied.append(arguments[4])

    monkeypatch.setattr(engine._copier, "scatter", late)
    monkeypatch.setattr(engine._copier, "scatter_layers", partial(Copier.scatter_layers, engine._copier))
    return begun, go, copied


def test_a_cancelled_task_copies_no_further_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(0, 32)
    with make_engine(64) as engine:
        stored(engine, tokens)
        _, slots = registered(engine, tokens)
        begun, go, copied = held_back(engine, monkeypatch)
        task, _ = engine.get_match(tokens)
        engine.launch([task], [slots], layerwise_transfer=True)
        assert begun.wait(60)
        engine.cancel([task])
        go.set()
        result = engine.wait([task], timeout=60)[task]
        assert (result.status, result.mask.any()) == (TaskStatus.CANCELLED, False)
        assert copied == [range(1)]
        at_rest(engine)


def test_what_comes_while_the_engine_closes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, closing = prompt(0, 32), Event()
    engine = make_engine(64)
    stored(engine, tokens)
    _, slots = registered(engine, tokens)
    begun, go, _ = held_back(engine, monkeypatch)
    shutdown = engine._workers.shutdown

    def told(wait: bool) -> None:
        shutdown(wait=False)
        closing.set()
        shutdown(wait=wait)

    monkeypatch.setattr(engine._workers, "shutdown", told)
    engine.get_async(tokens, slots)
    assert begun.wait(60)
    closer = Thread(target=engine.close)
    closer.start()
    assert closing.wait(60)
    for call in (engine.get_match, engine.put_match, engine.prefetch_async):
        with pytest.raises(ClosedError):
            call(tokens)
    go.set()
    closer.join(60)
    assert not closer.is_alive()
    assert _pinned(engine) == 0


def test_a_stage_outlives_its_engine() -> None:
    tokens = prompt(0, 32)
    engine = make_engine(64)
    stored(engine, tokens)
    _, slots = registered(engine, tokens)
    stage = engine.stage(engine.chain(tokens))
    kv = engine._kv
    assert kv
    engine.close()
    with pytest.raises(ClosedError):
        stage.load_layers(kv, slots)
    stage.release()
    assert _pinned(engine) == 0
    assert not engine.get_stats()["hit_tokens"]


def _pinned(engine: CacheEngine) -> int:
    store: Any = engine._store
    return int(store.dram.index.pinned)


def test_nobody_waits_for_a_layered_load_that_never_begins() -> None:
    go, progress = Event(), Progress(2)
    executor = ThreadPoolExecutor(1)
    executor.submit(go.wait, 60)
    load = LayerLoad(executor, progress, lambda _: True, lambda _: None)
    executor.shutdown(wait=False, cancel_futures=True)
    assert progress.stopped
    assert not load.wait(0)
    assert not load.complete()
    assert load.close() is None
    go.set()


def test_nothing_to_find() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        _, slots = registered(engine, tokens)
        task = engine.get_async(tokens, slots)
        result = engine.wait([task])[task]
        assert (result.status, result.mask.any()) == (TaskStatus.NOTFOUND, False)


def test_prefetch_brings_the_disks_blocks_up(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(64, tmp_path) as engine:
        stored(engine, tokens)
    with make_engine(64, tmp_path) as engine:
        assert engine._store.match(engine.chain(tokens).keys)[:2] == (0, (("disk", 16),))
        task = engine.prefetch_async(tokens)
        assert engine.wait([task])[task].status is TaskStatus.SUCCESS
        assert engine._store.match(engine.chain(tokens).keys)[:2] == (16, (("disk", 16),))
        assert "hit_tokens" not in engine.get_stats() or engine.get_stats()["hit_tokens"] == {}
        at_rest(engine)


def test_a_prefetch_whose_question_is_not_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It touches no slots, so nothing is to be certain of when its time is up."""
    with make_engine(64, **{"storage.remote.lookup_timeout_s": 4, "engine.timeout_s": 4}) as engine:
        monkeypatch.setattr(engine._store, "asks", True)
        asked = threading.Event()
        monkeypatch.setattr(engine._store, "ask", lambda *_, **__: (asked.set(), Future())[1])
        task = engine.prefetch_async(prompt(0, 32))
        assert asked.wait(30)
        began = time.monotonic()
        assert engine.wait([task], timeout=0.1)[task].status is TaskStatus.TIMEOUT
        assert time.monotonic() - began < 2


def test_cpu_only_leaves_the_disk_alone(tmp_path: Path) -> None:
    with make_engine(16, tmp_path) as engine:
        gate = gated(engine, prompt(0, 64))
        task, mask = engine.get_match(prompt(0, 64), cpu_only=True)
        assert not mask.any()
        assert not gate.asked.is_set()
        engine.cancel([task])


def test_a_stuck_disk_is_a_timeout_and_the_slots_stay_clean(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(16, tmp_path) as engine:
        gate = gated(engine, tokens)
        pages, slots = registered(engine, tokens)
        task = engine.get_async(tokens, slots)
        started = time.monotonic()
        result = engine.wait([task], timeout=0.2)[task]
        assert time.monotonic() - started < 5
        assert (result.status, result.mask.any()) == (TaskStatus.TIMEOUT, False)
        gate.open()
        at_rest(engine)
        assert pages.holds(tokens, slots, np.zeros(64, bool))


def test_a_synchronous_retrieve_keeps_its_deadline(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(16, tmp_path) as engine:
        gate = gated(engine, tokens)
        pages, slots = registered(engine, tokens)
        started = time.monotonic()
        mask = engine.retrieve(tokens, None, None, slots, timeout=0.2)
        assert time.monotonic() - started < 5
        assert not mask.any()
        assert engine.get_stats()["miss_tokens"] == {"timeout": 64}
        gate.open()
        at_rest(engine)
        assert pages.holds(tokens, slots, mask)


def test_cancel_ends_a_running_task(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    with make_engine(16, tmp_path) as engine:
        gate = gated(engine, tokens)
        pages, slots = registered(engine, tokens)
        task = engine.get_async(tokens, slots)
        assert gate.asked.wait(10)
        engine.cancel([task])
        result = engine.wait([task], timeout=10)[task]
        assert (result.status, result.mask.any()) == (TaskStatus.CANCELLED, False)
        gate.open()
        at_rest(engine)
        assert pages.holds(tokens, slots, np.zeros(64, bool))


def test_closing_ends_everything_at_once(tmp_path: Path) -> None:
    tokens = prompt(0, 64)
    engine = make_engine(16, tmp_path)
    gate = gated(engine, tokens)
    _, slots = registered(engine, tokens)
    engine.get_async(tokens, slots)
    engine.get_match(tokens)
    gate.open()
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10


def test_a_match_that_nobody_launches_gives_its_blocks_back() -> None:
    with make_engine(64, **{"engine.timeout_s": 0.05, "engine.lease_s": 0.05}) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        task, _ = engine.get_match(tokens)
        with pytest.raises(CancelledError):
            engine._tasks[task].future.result(10)
        assert engine.try_wait([task])[task].status is TaskStatus.CANCELLED
        at_rest(engine)


def test_what_cannot_be_launched_keeps_nothing() -> None:
    """Its caller has no number to cancel it by, and a lease is long."""
    with make_engine(64) as engine:
        tokens = prompt(0, 32)
        stored(engine, tokens)
        with pytest.raises(InputError, match="kvcaches is missing"):
            engine.get_async(tokens, np.arange(32))
        registered(engine, tokens)
        for call in (engine.get_async, engine.put_async):
            with pytest.raises(InputError, match="slot_mapping of shape"):
                call(tokens, np.arange(8))
        at_rest(engine)
        assert not engine._tasks


def test_bad_calls_end_in_one_clear_line() -> None:
    with make_engine(64) as engine:
        tokens = prompt(0, 8)
        task, _ = engine.put_match(tokens)
        with pytest.raises(InputError, match="kvcaches is missing"):
            engine.launch([task], [np.arange(8)])
        registered(engine, tokens)
        with pytest.raises(InputError, match="1 slot_mappings for 2 tasks"):
            engine.launch([task, task], [np.arange(8)])
        with pytest.raises(InputError, match=r"slot 259: the KV cache has slots 0\.\.255"):
            engine.launch([task], [np.arange(252, 260)])
        with pytest.raises(InputError, match=f"task_ids .{task}, {task}.: each task must stand there once"):
            engine.launch([task, task], [np.arange(8)] * 2, as_batch=True)
        with pytest.raises(InputError, match="task 77: there is no such task"):
            engine.launch([77], [np.arange(8)])
        engine.launch([task], [np.arange(8)])
        with pytest.raises(InputError, match=f"task {task}: was launched before"):
            engine.launch([task], [np.arange(8)])
        assert engine.wait([task])[task].status is TaskStatus.SUCCESS
