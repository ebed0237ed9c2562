"""Many threads on one engine with too little of everything: nothing wrong, nothing stuck, nothing left behind."""

import threading
from pathlib import Path

import numpy as np

from cairn.engine import CacheEngine, TaskStatus

from .pages import Pages, at_rest, make_engine
from .test_model import path

THREADS = 6
STEPS = 120


def worker(engine: CacheEngine, seed: int, problems: list[str]) -> None:
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        tokens = path(int(rng.integers(4, 60)), int(rng.choice([0, 8, 18, 30])), int(rng.integers(3)))
        pages = Pages(seed * STEPS + step)
        slots = pages.slots(len(tokens))
        action = rng.integers(6)
        if action < 2:
            pages.prefill(tokens, slots)
            engine.store(tokens, None, pages.tensors, slots)
        elif action == 2:
            task = engine.prefetch_async(tokens)
            if rng.random() < 0.5:
                engine.cancel([task])
            engine.wait([task])
        else:
            pages.clear()
            mask = engine.retrieve(tokens, None, pages.tensors, slots, timeout=float(rng.choice([0.0, 0.001, 5.0])))
            if not pages.holds(tokens, slots, mask):
                problems.append(f"thread {seed}, step {step}: wrong bytes")


def test_threads(tmp_path: Path) -> None:
    with make_engine(40, tmp_path, 400_000) as engine:
        problems: list[str] = []
        threads = [threading.Thread(target=worker, args=(engine, seed, problems)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a call hangs"
        assert problems == []
        at_rest(engine)
        hits = engine.get_stats()["hit_tokens"]
        assert isinstance(hits, dict)
        assert hits["dram"]
        assert hits["disk"]


def test_tasks_of_many_threads_on_one_cache(tmp_path: Path) -> None:
    """Every thread has slots of its own in one registered cache; launches, cancels and timeouts cross each other."""
    with make_engine(40, tmp_path, 400_000) as engine:
        pages = Pages()
        pages.clear()
        engine.register_kv_caches(pages.tensors)
        expected = Pages()
        expected.clear()
        lock, statuses = threading.Lock(), set()

        def run(seed: int) -> None:
            rng = np.random.default_rng(seed)
            mine = np.arange(seed * 40, (seed + 1) * 40)
            for _ in range(40):
                tokens = path(40, int(rng.choice([8, 18, 30])), int(rng.integers(3)))
                mine = rng.permutation(mine)
                if rng.random() < 0.4:
                    with lock:
                        pages.prefill(tokens, mine)
                        expected.prefill(tokens, mine)
                    task = engine.put_async(tokens, mine)
                    statuses.add(engine.wait([task])[task].status)
                    continue
                task = engine.get_async(tokens, mine)
                if rng.random() < 0.2:
                    engine.cancel([task])
                result = engine.wait([task], timeout=float(rng.choice([0.0, 10.0])))[task]
                statuses.add(result.status)
                loaded = int(np.count_nonzero(result.mask))
                with lock:
                    for layer, tensor in enumerate(expected.tensors):
                        # What came beyond the mask, before a cancel, is the caller's to ignore: take it as it is.
                        flat = tensor.reshape(2, 256, -1)
                        flat[:, mine[loaded:]] = pages.tensors[layer].reshape(2, 256, -1)[:, mine[loaded:]]
                    expected.prefill(tokens[:loaded], mine[:loaded])

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a call hangs"
        at_rest(engine)
        assert {TaskStatus.SUCCESS, TaskStatus.TIMEOUT} <= statuses
        for mine_now, wanted in zip(pages.tensors, expected.tensors, strict=True):
            assert (mine_now == wanted).all(), "slots were written after their task was reported"
