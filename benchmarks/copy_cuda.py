"""The CUDA copier against the bus: correct first, then GB/s of every path by the length of the contiguous pieces.

    PYTHONPATH=src python3 benchmarks/copy_cuda.py --out copy_cuda.json

Needs one CUDA GPU with 10 GiB free, 5 GiB of host memory and about two minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.copy import PagedKV, cuda
from cairn.copy.cuda import CudaCopier
from cairn.kv import KVGeometry
from cairn.tier.arena import Arena

GIB = 1 << 30
REPEATS = 15
PIECES = tuple(kib << 10 for kib in (4, 16, 64, 256, 1024, 2048))
BAR_BYTES, BAR_SHARE, BAR_BOTH = 64 << 10, 0.95, 95.0


def gbps(runs: list[Callable[[], Any]], moved: int) -> float:
    """Median GB/s of REPEATS runs, each of the next entry of `runs` (rotating buffers)."""
    seconds = []
    for i in range(REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        runs[i % len(runs)]()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return moved / statistics.median(seconds[1:]) / 1e9


def ceilings(host: torch.Tensor) -> dict[str, float]:
    """Plain copies of 1 GiB. host: pinned, uint8, at least 2 GiB."""
    device = [torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2)]
    halves = host[:GIB], host[GIB : 2 * GIB]
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            device[0].copy_(halves[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            halves[1].copy_(device[1], non_blocking=True)

    return {
        "h2d": gbps([lambda i=i: device[i].copy_(halves[i], non_blocking=True) for i in range(2)], GIB),
        "d2h": gbps([lambda i=i: halves[i].copy_(device[i], non_blocking=True) for i in range(2)], GIB),
        "both": gbps([both], 2 * GIB),
    }


def cache(layout: str, g: KVGeometry, pages: int, seed: int) -> list[torch.Tensor]:
    shapes = {
        "nhd": (2, pages, g.block_tokens, g.kv_heads, g.head_dim),
        "nhd_paged": (pages, 2, g.block_tokens, g.kv_heads, g.head_dim),
        "hnd": (2, pages, g.kv_heads, g.block_tokens, g.head_dim),
        "mla": (pages, g.block_tokens, g.head_dim),
        "cross_layer": (pages, g.layers, 2, g.block_tokens, g.kv_heads, g.head_dim),
    }
    generator = torch.Generator("cuda").manual_seed(seed)
    count = 1 if layout == "cross_layer" else g.layers
    shape = shapes[layout]
    return [
        torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda", generator=generator)
        for _ in range(count)
    ]


def indexed(tensors: list[torch.Tensor], layout: str, g: KVGeometry, slots: torch.Tensor) -> torch.Tensor:
    """The oracle: [blocks, layer, plane, token, head * dim] by torch indexing."""
    page, offset = slots // g.block_tokens, slots % g.block_tokens
    found = []
    for layer in range(g.layers):
        for plane in range(g.planes):
            if layout == "cross_layer":
                picked = tensors[0][page, layer, plane, offset]
            elif layout == "nhd_paged":
                picked = tensors[layer][page, plane, offset]
            elif layout == "mla":
                picked = tensors[layer][page, offset]
            elif layout == "hnd":
                picked = tensors[layer][plane][page, :, offset]
            else:
                picked = tensors[layer][plane][page, offset]
            found.append(picked.reshape(-1, g.block_tokens, g.kv_heads * g.head_dim))
    return torch.stack(found, 1).reshape(-1, g.layers, g.planes, g.block_tokens, g.kv_heads * g.head_dim)


def check(layout: str, path: str, pages_move_whole: bool, pinned: bool) -> None:
    """Random data through gather and scatter, outputs poisoned, against the oracle. Raises AssertionError."""
    planes: Any = 1 if layout == "mla" else 2
    g = KVGeometry(layers=3, kv_heads=1 if planes == 1 else 4, head_dim=64, block_tokens=16, planes=planes)
    blocks, pages = 40, 64
    source, target = cache(layout, g, pages, 1), cache(layout, g, pages, 2)
    rng = np.random.default_rng(3)
    if pages_move_whole:
        slots = (rng.permutation(pages)[:blocks, None] * 16 + np.arange(16)).reshape(-1)
    else:
        slots = rng.permutation(pages * 16)[: blocks * 16]
    rows = rng.permutation(blocks + 3)[:blocks].astype(np.int32)
    stride = -(-g.block_bytes // 4096) * 4096
    memory = np.full((blocks + 3 + 1, stride), 0xA5, np.uint8)
    skip = -memory.ctypes.data % 4096
    memory = memory.reshape(-1)[skip : skip + (blocks + 3) * stride].reshape(-1, stride)
    copier = CudaCopier(g, path=path)
    if pinned:
        copier.register(memory)
    where = torch.from_numpy(slots).cuda()
    expected = indexed(source, layout, g, where)
    what = f"{layout}, {path}, whole pages {pages_move_whole}, pinned {pinned}"

    copier.gather(PagedKV.from_tensors(source, layout, g), slots, memory, rows)
    stored = memory[rows, : g.block_bytes].copy().view(np.int16).reshape(tuple(expected.shape))
    assert (stored == expected.cpu().numpy()).all(), f"gather: {what}"
    others = np.setdiff1d(np.arange(blocks + 3), rows)
    assert (memory[others] == 0xA5).all(), f"gather wrote other rows: {what}"

    holes = np.where(rng.random(len(slots)) < 0.2, -1, slots)
    before = [tensor.clone() for tensor in target]
    memory[rows, : g.block_bytes] = stored.reshape(blocks, -1).view(np.uint8)
    copier.scatter(PagedKV.from_tensors(target, layout, g), holes, memory, rows)
    kept = torch.from_numpy(holes >= 0).cuda()
    everywhere = torch.arange(pages * 16, device="cuda")
    tokens = (0, 3, 1, 2, 4)
    wanted = indexed(before, layout, g, everywhere).permute(tokens).reshape(pages * 16, -1)
    wanted[where[kept]] = expected.permute(tokens).reshape(blocks * 16, -1)[kept]
    found = indexed(target, layout, g, everywhere).permute(tokens).reshape(pages * 16, -1)
    assert torch.equal(found, wanted), f"scatter: {what}"

    memory[...] = 0x5A
    copier.gather(PagedKV.from_tensors(source, layout, g), holes, memory, rows, range(1, 2))
    part = memory[rows, : g.block_bytes].copy().view(np.int16).reshape(tuple(expected.shape))
    truth = np.full_like(part, 0x5A5A)
    mask = (holes >= 0).reshape(blocks, 16)
    truth[:, 1] = np.where(mask[:, None, :, None], expected.cpu().numpy()[:, 1], truth[:, 1])
    assert (part == truth).all(), f"gather of one layer, with holes: {what}"
    copier.close()


def check_all() -> int:
    """Every layout and path, in many parts, so that the ring goes round. Returns how many combinations were right."""
    done = 0
    whole_parts = cuda._FIRST_BYTES, cuda._STAGING_BYTES
    cuda._FIRST_BYTES, cuda._STAGING_BYTES = 1, 128 << 10
    for layout in ("nhd", "nhd_paged", "cross_layer", "hnd", "mla"):
        for path in cuda.PATHS:
            for whole in (True, False):
                for pinned in (True, False):
                    check(layout, path, whole, pinned)
                    done += 1
    cuda._FIRST_BYTES, cuda._STAGING_BYTES = whole_parts
    return done


def geometry_for(piece: int) -> KVGeometry:
    """Pages of `piece` bytes a plane and layer: 16 tokens, as many layers as make rows of 4 MiB, 32 at most."""
    layers = max(1, min(32, (4 << 20) // (2 * piece)))
    return KVGeometry(layers=layers, kv_heads=1, head_dim=piece // 32, block_tokens=16)


def measure(piece: int, path: str, arena: np.ndarray) -> dict[str, Any]:
    """GB/s of 1 GiB of permuted rows and slots: gather, scatter, both at once; enqueueing seconds.

    both: two calls each way, one behind the other, as an engine makes them under load. both_once: one call each way,
    with its beginning and end, when not all of the bus is busy. in_order: two calls each way, enqueued by one thread,
    all loads before all stores.
    """
    g = geometry_for(piece)
    blocks = GIB // g.block_bytes
    rows_there = arena.reshape(-1)[: 4 * GIB].reshape(-1, g.block_bytes)
    copier = CudaCopier(g, path=path)
    copier.register(arena)
    caches = [PagedKV.from_tensors(cache("nhd", g, 2 * blocks, i), "nhd", g) for i in range(2)]
    rng = np.random.default_rng(0)

    def share(first: int, of: int) -> np.ndarray:
        return rng.permutation(np.arange(first, first + of))[:blocks]

    jobs = [
        ((share(0, 2 * blocks)[:, None] * 16 + np.arange(16)).reshape(-1), share(i * blocks, blocks).astype(np.int32))
        for i in range(4)
    ]

    def gather(i: int) -> None:
        copier.gather_async(caches[0], jobs[i][0], rows_there, jobs[i][1])

    def scatter(i: int) -> None:
        copier.scatter_async(caches[1], jobs[i][0], rows_there, jobs[i][1])

    def both(calls: int, i: int) -> None:
        # Stores and loads come from threads of their own, as they do in an engine.
        others = [loader.submit(scatter, 2 + (i + n) % 2) for n in range(calls)]
        for n in range(calls):
            gather((i + n) % 2)
        for other in others:
            other.result()

    def in_order(i: int) -> None:
        for copy in (scatter, gather):
            for n in range(2):
                copy(2 * (copy is scatter) + (i + n) % 2)

    moved = blocks * g.block_bytes
    found: dict[str, Any] = {
        "piece_bytes": piece,
        "path": path,
        "gather": gbps([partial(gather, i) for i in range(2)], moved),
        "scatter": gbps([partial(scatter, i) for i in (2, 3)], moved),
    }
    with ThreadPoolExecutor(1) as loader:
        found["both"] = gbps([partial(both, 2, i) for i in range(2)], 4 * moved)
        found["both_once"] = gbps([partial(both, 1, i) for i in range(2)], 2 * moved)
    found["in_order"] = gbps([partial(in_order, i) for i in range(2)], 4 * moved)
    torch.cuda.synchronize()
    start = time.perf_counter()
    gather(0)
    found["enqueue_ms"] = (time.perf_counter() - start) * 1e3
    copier.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", action="store_true", help="the arena in /dev/shm, as vLLM's workers have it")
    parser.add_argument("--paths", nargs="+", choices=cuda.PATHS, default=list(cuda.PATHS))
    parser.add_argument("--seconds", type=float, default=140, help="start no new measurement after that long")
    args = parser.parse_args()
    began = time.perf_counter()
    right = check_all()
    print(f"{right} combinations right after {time.perf_counter() - began:.0f} s", flush=True)
    home = Arena.shared("bench", 4, GIB) if args.shared else Arena(4, GIB)
    Arena.unlink("bench")
    arena = home.memory
    owner = CudaCopier(geometry_for(PIECES[0]))
    start = time.perf_counter()
    owner.register(arena)
    pinning = time.perf_counter() - start
    limits = ceilings(torch.from_numpy(arena.reshape(-1)))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "combinations_right": right,
        "shared_arena": args.shared,
        "ceilings_gbps": limits,
        "pinning_seconds_a_gib": pinning / 4,
        "break_even_bytes": cuda.BREAK_EVEN,
        "runs": [],
    }
    lines = [f"ceilings GB/s: h2d {limits['h2d']:.1f}  d2h {limits['d2h']:.1f}  both {limits['both']:.1f}"]
    lines.append(
        f"{'piece':>8} {'path':>7} {'gather':>7} {'scatter':>8} {'both':>6} {'once':>6} {'order':>6} {'enqueue ms':>11}"
    )
    for path in args.paths:  # the shortest pieces last: what comes late is lost when time is up
        for piece in reversed(PIECES):
            if time.perf_counter() - began > args.seconds:
                continue
            run = measure(piece, path, arena)
            run["meets_bars"] = piece < BAR_BYTES or (
                run["gather"] >= BAR_SHARE * limits["d2h"]
                and run["scatter"] >= BAR_SHARE * limits["h2d"]
                and run["both"] >= BAR_BOTH
            )
            result["runs"].append(run)
            names = ("gather", "scatter", "both", "both_once", "in_order")
            figures = "".join(f"{run[name]:8.1f}" for name in names)
            figures += f" {run['enqueue_ms']:11.1f}"
            lines.append(f"{piece >> 10:>4} KiB {path:>7}{figures}{'' if run['meets_bars'] else '  below the bar'}")
            args.out.write_text(json.dumps(result, indent=1))
    owner.close()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
