"""The VRAM pool between two GPUs of one host: what one process stores another retrieves, against plain copies.

    PYTHONPATH=src python3 benchmarks/vram_pool.py --out vram_pool.json              # two CUDA devices, about 80 s
    PYTHONPATH=src python3 benchmarks/vram_pool.py --stand-in --out vram_pool.json   # the same code without a GPU

Three processes besides this one: the node, an engine on GPU 0 that stores, one on GPU 1 that retrieves. Llama-8B's
geometry, blocks of 2 MiB; the paged cache in two layouts: pages of 2 MiB in one run, and 64 pieces of 32 KiB a page.
Every retrieve is timed as a caller sees it (questions to the node included), and every byte of it is compared on the
device. One follows the other, as the plain copies do; `cold`: before each one 256 MB of host memory are written, so
that neither the caller's code nor the node's is in a cache. Where its time goes is told beside it (`split`, medians,
milliseconds): until the copier is called, until its first copy is enqueued, until its last is, the copies on the
device, the copier as a whole, and from its end to the call's. Needs 10 GiB on GPU 0, 9 GiB on GPU 1, and 5 GiB in
/dev/shm for the way through Cairn's DRAM, which is left out where that is not there.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.config import Config, load_config
from cairn.copy import PagedKV
from cairn.engine import CacheEngine
from cairn.kv import KVGeometry, Namespace

G = KVGeometry(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
LAYOUTS = ("cross_layer", "nhd")
REPEATS, WARM = 9, 2
#: More than the caches of a processor.
COLD_BYTES = 256 << 20
BAR_CEILING, BAR_PINNED = 0.90, 10.0
#: Seconds that any one step may take before everything is given up.
STEP_S = 240.0


class Place:
    """Where a process's paged cache is: a CUDA device, or host memory in its place. blocks: how many it holds."""

    def __init__(self, index: int, stand_in: bool, blocks: int) -> None:
        self.stand_in = stand_in
        self.blocks = blocks
        self.device = torch.device("cpu") if stand_in else torch.device("cuda", index)
        self.name = "stand-in" if stand_in else f"cuda:{index}"

    def synchronize(self) -> None:
        if not self.stand_in:
            torch.cuda.synchronize(self.device)

    def empty_cache(self, layout: str) -> list[torch.Tensor]:
        """A paged cache full of what nobody has stored, int16 in the place of bf16."""
        page = (G.block_tokens, G.kv_heads, G.head_dim)
        if layout == "cross_layer":
            shapes: list[tuple[int, ...]] = [(self.blocks, G.layers, 2, *page)]
        else:
            shapes = [(2, self.blocks, *page)] * G.layers
        return [torch.full(shape, 0x5A5A, dtype=torch.int16, device=self.device) for shape in shapes]

    def layer(self, tensors: list[torch.Tensor], layout: str, layer: int) -> torch.Tensor:
        """One layer's view, [2, pages, page]."""
        return tensors[0][:, layer].transpose(0, 1) if layout == "cross_layer" else tensors[layer]

    def expected(self, seed: int, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """What prefill would write in one layer, [2, pages, page]: another value for every place of every block."""
        plane_values = G.block_tokens * G.kv_heads * G.head_dim
        places = torch.arange(2 * plane_values, dtype=torch.int32, device=self.device).reshape(2, 1, -1)
        block = torch.empty(self.blocks, dtype=torch.int32, device=self.device)
        block[pages] = torch.arange(self.blocks, dtype=torch.int32, device=self.device)
        mixed = (places * 40503) ^ (block.reshape(1, -1, 1) * 7919 + layer * 104729 + seed * 15485863)
        return (mixed ^ (mixed >> 13)).to(torch.int16).reshape(2, self.blocks, G.block_tokens, G.kv_heads, G.head_dim)

    def fill(self, tensors: list[torch.Tensor], layout: str, seed: int, pages: torch.Tensor) -> None:
        for layer in range(G.layers):
            self.layer(tensors, layout, layer).copy_(self.expected(seed, layer, pages))


class Split:
    """Where the time of a retrieve goes, by looking at what its copier does. Seconds, an entry a call."""

    def __init__(self, engine: CacheEngine, stand_in: bool) -> None:
        self.times: dict[str, list[float]] = {}
        self._began = self._entered = self._left = 0.0
        self._enqueued: float | None = None
        self._copier: Any = engine._copier  # type: ignore[attr-defined]
        self._real = self._copier.scatter if stand_in else self._copier.scatter_async
        if stand_in:
            self._copier.scatter = self._scatter
        else:
            self._copier.scatter_async = self._scatter_async
            self._watch_driver()

    def call(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What the function returns, and how long it took."""
        self._enqueued = None
        self._began = time.perf_counter()
        result = function()
        ended = time.perf_counter()
        self._note("before the copier", self._entered - self._began)
        if self._enqueued:
            self._note("until the first enqueue", self._enqueued - self._entered)
        self._note("in the copier", self._left - self._entered)
        self._note("behind it", ended - self._left)
        return result, ended - self._began

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times[WARM:]) * 1e3 for name, times in self.times.items()}

    def _note(self, name: str, seconds: float) -> None:
        self.times.setdefault(name, []).append(seconds)

    def _scatter(self, *arguments: Any) -> None:
        self._entered = time.perf_counter()
        self._real(*arguments)
        self._left = time.perf_counter()

    def _scatter_async(self, *arguments: Any) -> "Waited":
        self._entered = time.perf_counter()
        return Waited(self._real(*arguments), self, time.perf_counter())

    def over(self, device_s: float, enqueued: float) -> None:
        """The copy is over, which was enqueued by then."""
        self._left = time.perf_counter()
        self._note("until all is enqueued", enqueued - self._entered)
        self._note("on the device", device_s)

    def _watch_driver(self) -> None:
        from cairn.copy import driver

        real = driver.copy_batch

        def watched(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            self._enqueued = self._enqueued or time.perf_counter()

        driver.copy_batch = watched


class Waited:
    """A copy that tells its split when it was waited for."""

    def __init__(self, copy: Any, split: Split, enqueued: float) -> None:
        self._copy, self._split, self._enqueued = copy, split, enqueued

    def synchronize(self) -> None:
        self._copy.synchronize()
        self._split.over(self._copy.seconds(), self._enqueued)


def settings(place: Place, vram_blocks: int) -> Config:
    vram = {"storage.vram.size": vram_blocks * G.block_bytes, "storage.vram.device": place.name}
    return load_config(
        environ={},
        overrides={
            "storage.cpu.policy": "lru",
            "storage.disk.policy": "lru",
            "engine.planner": False,
            "engine.timeout_s": 30,
            "engine.lease_s": 60,
            "node.timeout_s": 2,
            **vram,
        },
    )


def node_process(address: str, dram: int, pipe: Any) -> None:
    from cairn.engine.pool import open_pool, prepare
    from cairn.node.server import Node

    sys.setswitchinterval(0.0005)  # as `cairn node`
    policies = {f"storage.{tier}.policy": "lru" for tier in ("vram", "cpu", "disk")}
    config = load_config(environ={}, overrides={"storage.cpu.size": dram, "node.lease_s": 60, **policies})
    prepare(config)
    node = Node(config, address, open_pool)
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    pipe.send("listening")
    node.run()
    node.close(10)


def engine_process(address: str, index: int, stand_in: bool, blocks: int, pipe: Any) -> None:
    """Does as it is told: (what, arguments), each answered; None ends it."""
    place = Place(index, stand_in, blocks)
    if not stand_in:
        torch.cuda.set_device(place.device)
    pipe.send("ready")
    engines: dict[str, CacheEngine] = {}
    splits: dict[str, Split] = {}
    caches: dict[str, tuple[list[torch.Tensor], PagedKV, np.ndarray, torch.Tensor]] = {}

    def cache(layout: str, engine: CacheEngine) -> tuple[list[torch.Tensor], PagedKV, np.ndarray, torch.Tensor]:
        """Tensors, their description, the slots of a prompt in them, its pages."""
        if layout not in caches:
            caches.clear()
            tensors = place.empty_cache(layout)
            pages = np.random.default_rng(index).permutation(blocks)
            slots = (pages[:, None] * G.block_tokens + np.arange(G.block_tokens)).reshape(-1)
            kv = engine.register_kv_caches(tensors, layout)
            caches[layout] = tensors, kv, slots, torch.from_numpy(pages).to(place.device)
        return caches[layout]

    def connect(vram_blocks: int) -> str:
        engines["it"] = CacheEngine(Namespace(model="bench", geometry=G), settings(place, vram_blocks), node=address)
        splits["it"] = Split(engines["it"], stand_in)
        return place.name if stand_in else str(torch.cuda.get_device_name(place.device))

    def prompt(engine: CacheEngine, seed: int) -> Any:
        return engine.chain(np.random.default_rng(seed).integers(0, 1 << 17, blocks * G.block_tokens))

    def store(layout: str, seed: int) -> dict[str, Any]:
        engine = engines["it"]
        tensors, kv, slots, pages = cache(layout, engine)
        place.fill(tensors, layout, seed, pages)
        place.synchronize()
        chain = prompt(engine, seed)
        began = time.perf_counter()
        stored = engine.store(chain, None, kv, slots)
        seconds = time.perf_counter() - began
        durable = engine.flush(60)
        held = engine._store.match(chain.keys)  # type: ignore[attr-defined]
        return {"tokens": stored, "seconds": seconds, "vram": held.vram, "dram": held.dram, "flushed": durable}

    def retrieve(layout: str, seed: int, path: str, repeats: int, cold: bool) -> dict[str, Any]:
        engine = engines["it"]
        tensors, kv, slots, pages = cache(layout, engine)
        wanted = [torch.empty_like(tensor) for tensor in tensors]
        place.fill(wanted, layout, seed, pages)
        engine._copier._path = path  # type: ignore[attr-defined] # the way under test
        chain, seconds, right = prompt(engine, seed), [], True
        split = splits["it"]
        split.times.clear()
        others = np.zeros(COLD_BYTES // 8)
        before = dict(engine.get_stats()["hit_tokens"])  # type: ignore[call-overload]
        for _ in range(WARM + repeats):
            for tensor in tensors:
                tensor.fill_(0x5A5A)
            place.synchronize()
            if cold:
                others += 1
            mask, taken = split.call(partial(engine.retrieve, chain, None, kv, slots))
            seconds.append(taken)
            right = right and bool(mask.all()) and all(map(torch.equal, tensors, wanted))
        hits: Any = engine.get_stats()["hit_tokens"]
        by_tier = {tier: hits[tier] - before.get(tier, 0) for tier in hits}
        median = statistics.median(seconds[WARM:])
        moved = blocks * G.block_bytes
        return {
            "layout": layout,
            "path": path,
            "cold": cold,
            "right": right,
            "hit_tokens": {tier: count for tier, count in by_tier.items() if count},
            "milliseconds": median * 1e3,
            "fastest_milliseconds": min(seconds) * 1e3,
            "gbps": moved / median / 1e9,
            "split": split.medians(),
        }

    def close() -> bool:
        caches.clear()
        engines.pop("it").close()
        return True

    calls: dict[str, Callable[..., Any]] = {"connect": connect, "store": store, "retrieve": retrieve, "close": close}
    while (asked := pipe.recv()) is not None:
        pipe.send(calls[asked[0]](*asked[1:]))


class Child:
    """A process and the pipe to it."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        if not self._pipe.poll(STEP_S):
            raise TimeoutError("a process does not answer")
        return self._pipe.recv()

    def begin(self, *asked: Any) -> None:
        self._pipe.send(asked)

    def ask(self, *asked: Any) -> Any:
        self.begin(*asked)
        return self.answer()

    def end(self) -> None:
        """In order, so that nothing stays in /dev/shm; else by force."""
        self.process.terminate()
        self.process.join(20)
        self.process.kill()
        self.process.join()


@contextmanager
def children() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(*arguments: Any) -> Child:
        made.append(Child(*arguments))
        return made[-1]

    try:
        yield make
    finally:
        for child in reversed(made):
            child.end()


def plain_copies(stand_in: bool, sizes: list[int]) -> dict[str, Any]:
    """GB/s of plain torch copies from GPU 0 to GPU 1: straight, and through host memory."""
    first, second = (torch.device("cpu"),) * 2 if stand_in else (torch.device("cuda", 0), torch.device("cuda", 1))
    largest = max(sizes)
    source = torch.zeros(largest, dtype=torch.uint8, device=first)
    target = torch.empty(largest, dtype=torch.uint8, device=second)

    def gbps(copy: Callable[[], Any], size: int, repeats: int) -> float:
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            copy()
            if not stand_in:
                torch.cuda.synchronize(first)
                torch.cuda.synchronize(second)
            seconds.append(time.perf_counter() - began)
        return size / statistics.median(seconds[1:]) / 1e9

    def straight(size: int) -> None:
        target[:size].copy_(source[:size])

    def through(host: torch.Tensor) -> None:
        host.copy_(source[: len(host)])
        target[: len(host)].copy_(host)

    peer = {str(size): gbps(partial(straight, size), size, 7) for size in sizes}
    found: dict[str, Any] = {"peer_by_bytes": peer, "peer": max(peer.values())}
    for name, pinned in (("pinned", not stand_in), ("pageable", False)):
        host = torch.zeros(min(sizes), dtype=torch.uint8, pin_memory=pinned)
        found[name] = gbps(partial(through, host), len(host), 3)
    return found


def measure(stand_in: bool, blocks: int, paths: list[str], began: float, budget_s: float) -> dict[str, Any]:
    moved = blocks * G.block_bytes
    free = os.statvfs("/dev/shm")
    room = free.f_bavail * free.f_frsize
    dram = moved + moved // 8 if room > moved + moved // 2 else max(G.block_bytes, room // 4)
    with tempfile.TemporaryDirectory(prefix="cairn-") as home, children() as start:
        address = f"ipc://{home}/node.sock"
        node = start(node_process, address, dram)
        giver, taker = (start(engine_process, address, index, stand_in, blocks) for index in (0, 1))
        plain = plain_copies(stand_in, [max(1, moved // part) for part in (4, 2, 1)])
        if not stand_in:
            torch.cuda.empty_cache()
        for child in (node, giver, taker):
            child.answer()
        giver.begin("connect", blocks + 8)
        taker.begin("connect", 8)
        result: dict[str, Any] = {
            "device": giver.answer(),
            "date": time.strftime("%Y-%m-%d"),
            "bytes": moved,
            "plain_gbps": plain,
            "runs": [],
        }
        taker.answer()
        print(f"plain copies, GB/s: {plain}; ready after {time.perf_counter() - began:.0f} s", flush=True)
        for seed, layout in enumerate(LAYOUTS):
            stored = giver.ask("store", layout, seed)
            print(f"{layout}: stored {stored}", flush=True)
            for path, cold in [("auto", False), ("auto", True), *((path, False) for path in paths if path != "auto")]:
                if path != "auto" and time.perf_counter() - began > budget_s:
                    continue
                run = judged(taker.ask("retrieve", layout, seed, path, REPEATS, cold), plain)
                run["store"] = stored
                result["runs"].append(run)
                print(line(run), flush=True)
        giver.ask("close")
        # Its VRAM is gone; what was written behind it is in DRAM.
        if dram > moved:
            result["dram"] = taker.ask("retrieve", LAYOUTS[-1], len(LAYOUTS) - 1, "auto", 2, False)
            print(f"the same from Cairn's DRAM: {result['dram']['gbps']:.1f} GB/s, right {result['dram']['right']}")
        taker.ask("close")
    return result


def judged(run: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    run["of_ceiling"] = run["gbps"] / plain["peer"]
    run["times_pinned"] = run["gbps"] / plain["pinned"]
    run["times_pageable"] = run["gbps"] / plain["pageable"]
    in_vram = set(run["hit_tokens"]) == {"vram"}
    run["meets_bars"] = (
        run["right"] and in_vram and run["of_ceiling"] >= BAR_CEILING and run["times_pinned"] >= BAR_PINNED
    )
    return run


def line(run: dict[str, Any]) -> str:
    caches = "cold" if run["cold"] else ""
    return (
        f"{run['layout']:>12} {run['path']:>7} {caches:4}: {run['gbps']:6.1f} GB/s ({run['milliseconds']:.2f} ms), "
        f"{run['of_ceiling']:.1%} of the ceiling, {run['times_pinned']:.1f} x pinned, "
        f"{run['times_pageable']:.1f} x pageable, right {run['right']}, hits {run['hit_tokens']}"
        f"{'' if run['meets_bars'] else '  below the bars'}\n{'':>21}"
        + ", ".join(f"{name} {milliseconds:.3f}" for name, milliseconds in run["split"].items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stand-in", action="store_true", help="host memory in the place of VRAM: no bars, a test")
    parser.add_argument("--blocks", type=int, help="of 2 MiB each; 2048, or 16 with --stand-in")
    parser.add_argument("--paths", nargs="+", default=["auto", "direct", "staged", "pieces"], help="of the copier")
    parser.add_argument("--seconds", type=float, default=75, help="measure no further paths after that long")
    args = parser.parse_args()
    began = time.perf_counter()
    blocks, paths = (args.blocks or 16, ["auto"]) if args.stand_in else (args.blocks or 2048, args.paths)
    result = measure(args.stand_in, blocks, paths, began, args.seconds)
    result["seconds"] = time.perf_counter() - began
    args.out.write_text(json.dumps(result, indent=1))
    wrong = [run for run in [*result["runs"], *([result["dram"]] if "dram" in result else [])] if not run["right"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
