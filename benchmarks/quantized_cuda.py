"""Quantized rows on a GPU: bit for bit what the CPU makes of them, then GB/s of the cache's elements.

    PYTHONPATH=src python3 benchmarks/quantized_cuda.py --out quantized_cuda.json [--sweep]

kernel: between the paged cache and staged rows in VRAM, by CUDA events. copier: between the paged cache and pinned host
memory, by the clock. Llama-3.1-8B's geometry (32 layers, 8 KV heads of 128, blocks of 16 tokens), permuted pages, drawn
values; medians of 15 runs. GB are of the cache's elements, so a bus of 55 GB/s carries 172 of them at 5.125 bits.

Needs one GPU with 12 GiB free, 2 GiB of host memory and about a minute (--sweep: one more).
"""

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.codec.quantized import Quantizer
from cairn.copy import PagedKV, cuda, cuda_quantized, triton_quantized
from cairn.copy.cpu_quantized import QuantizedCpuCopier
from cairn.copy.cuda_quantized import QuantizedCudaCopier
from cairn.kv import KVGeometry

LLAMA = KVGeometry(layers=32, kv_heads=8, head_dim=128, block_tokens=16)
BLOCKS, RUNS, BAR = 512, 15, 1000.0
LAYOUTS = ("nhd", "nhd_paged", "hnd", "halves", "cross_layer", "mla")
CODECS = ("int8", "fp8", "int4")


def shape_of(layout: str, g: KVGeometry, pages: int) -> tuple[int, ...]:
    return {
        "nhd": (2, pages, g.block_tokens, g.kv_heads, g.head_dim),
        "nhd_paged": (pages, 2, g.block_tokens, g.kv_heads, g.head_dim),
        "hnd": (2, pages, g.kv_heads, g.block_tokens, g.head_dim),
        "halves": (pages, g.kv_heads, g.block_tokens, 2 * g.head_dim),  # vLLM's since 0.32
        "cross_layer": (pages, g.layers, 2, g.block_tokens, g.kv_heads, g.head_dim),
        "mla": (pages, g.block_tokens, g.head_dim),
    }[layout]


def drawn(layout: str, g: KVGeometry, pages: int, seed: int) -> list[torch.Tensor]:
    """Channels of different widths; a few values that are not finite."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = []
    for _ in range(1 if layout == "cross_layer" else g.layers):
        values = torch.randn(shape_of(layout, g, pages), device="cuda", generator=generator)
        values *= torch.randn(values.shape[-1], device="cuda", generator=generator).exp()
        flat = values.view(-1)
        flat[:: flat.numel() // 5] = torch.tensor(float("nan"))
        flat[1 :: flat.numel() // 3] = torch.tensor(float("-inf"))
        tensors.append(values.to(getattr(torch, g.dtype)))
    return tensors


def paged(tensors: Sequence[Any], layout: str, g: KVGeometry) -> PagedKV:
    if layout != "halves":
        return PagedKV.from_tensors(tensors, layout, g)
    halves = [(t[..., : g.head_dim], t[..., g.head_dim :]) for t in tensors]
    return PagedKV.from_tensors(halves, "hnd", g)


def on_cpu(tensors: list[torch.Tensor]) -> list[Any]:
    word = torch.int32 if tensors[0].element_size() == 4 else torch.int16
    return [tensor.view(word).cpu().numpy() for tensor in tensors]


def check(layout: str, codec: str, dtype: str) -> None:
    """Gather, and scatter with holes and layer by layer, in many parts. Raises AssertionError."""
    planes: Any = 1 if layout == "mla" else 2
    g = KVGeometry(layers=3, kv_heads=1 if planes == 1 else 5, head_dim=64, dtype=dtype, block_tokens=32, planes=planes)
    quantizer = Quantizer(g, codec)
    tensors, pages, blocks = drawn(layout, g, 24, 1), 24, 17
    rng = np.random.default_rng(2)
    slots = rng.permutation(pages * 32)[: blocks * 32]
    rows = rng.permutation(blocks)[:blocks].astype(np.int32)
    host = on_cpu(tensors)
    memory, expected = (np.zeros((blocks, quantizer.stored.block_bytes), np.uint8) for _ in range(2))
    copier, oracle = QuantizedCudaCopier(quantizer), QuantizedCpuCopier(quantizer)
    copier.gather(paged(tensors, layout, g), slots, memory, rows)
    oracle.gather(paged(host, layout, g), slots, expected, rows)
    what = f"{layout}, {codec}, {dtype}"
    assert (memory == expected).all(), f"encode: {what}: {(memory != expected).mean():.2%} of the bytes differ"
    slots = np.where(rng.random(len(slots)) < 0.2, -1, slots)
    for layer in range(3):
        copier.scatter(paged(tensors, layout, g), slots, memory, rows, range(layer, layer + 1))
    oracle.scatter(paged(host, layout, g), slots, expected, rows)
    found = on_cpu(tensors)
    assert all((a == b).all() for a, b in zip(found, host, strict=True)), f"decode: {what}"
    copier.close()


def check_all() -> int:
    whole = cuda._FIRST_BYTES, cuda._STAGING_BYTES
    cuda._FIRST_BYTES, cuda._STAGING_BYTES = 1, 256 << 10
    cases = list(product(LAYOUTS, CODECS, ("bfloat16", "float16", "float32")))
    for case in cases:
        check(*case)
    cuda._FIRST_BYTES, cuda._STAGING_BYTES = whole
    return len(cases)


def by_events(run: Callable[[], Any]) -> float:
    """Median seconds on the device."""
    times = []
    for _ in range(RUNS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def by_clock(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run().synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


class Bench:
    """One layout and codec of Llama's geometry."""

    def __init__(self, layout: str, codec: str) -> None:
        self.quantizer, rng = Quantizer(LLAMA, codec), np.random.default_rng(0)
        self.tensors = drawn(layout, LLAMA, 2 * BLOCKS, 0)
        self.kv = paged(self.tensors, layout, LLAMA)
        self.slots = (rng.permutation(2 * BLOCKS)[:BLOCKS, None] * 16 + np.arange(16)).reshape(-1)
        self.moved = BLOCKS * LLAMA.block_bytes
        self.bases, self.table = (torch.from_numpy(a).cuda() for a in (self.kv.bases.reshape(-1).copy(), self.slots))
        self.staged = torch.empty((BLOCKS, self.quantizer.stored.block_bytes), dtype=torch.uint8, device="cuda")

    def kernel(self, into_rows: bool) -> float:
        """GB/s."""

        def run() -> None:
            triton_quantized.move(
                self.bases, self.table, self.staged.data_ptr(), self.quantizer, blocks=BLOCKS, layers=LLAMA.layers,
                strides=(self.kv.page_stride, self.kv.token_stride, self.kv.head_stride),
                page_tokens=self.kv.page_tokens, aligned=True, programs=cuda_quantized.PROGRAMS, into_rows=into_rows,
            )  # fmt: skip

        return self.moved / by_events(run) / 1e9

    def copier(self) -> dict[str, float]:
        """GB/s, and what enqueueing a load takes."""
        stored = self.quantizer.stored.block_bytes
        memory = np.frombuffer(mmap.mmap(-1, BLOCKS * stored), np.uint8).reshape(BLOCKS, stored)
        copier, rows = (
            QuantizedCudaCopier(self.quantizer),
            np.random.default_rng(1).permutation(BLOCKS).astype(np.int32),
        )
        copier.register(memory)
        copier.prepare(self.kv)
        found = {
            "gather": self.moved / by_clock(lambda: copier.gather_async(self.kv, self.slots, memory, rows)) / 1e9,
            "scatter": self.moved / by_clock(lambda: copier.scatter_async(self.kv, self.slots, memory, rows)) / 1e9,
        }
        begun = time.perf_counter()
        load = copier.scatter_async(self.kv, self.slots, memory, rows)
        found["enqueue_ms"] = (time.perf_counter() - begun) * 1e3
        load.synchronize()
        copier.close()
        return found


def sweep() -> list[dict[str, Any]]:
    """Other tiles and numbers of programs."""
    chosen = triton_quantized._TILE, cuda_quantized.PROGRAMS
    found = []
    for codec in CODECS:
        bench = Bench("nhd", codec)
        for tile, programs in product((32, 64, 128), (528, 1056, 2112, 4224)):
            triton_quantized._TILE, cuda_quantized.PROGRAMS = tile, programs
            one = {"codec": codec, "tile": tile, "programs": programs}
            one |= {"encode": bench.kernel(into_rows=True), "decode": bench.kernel(into_rows=False)}
            found.append(one)
            print(
                f"{codec} tile {tile:>3} programs {programs:>4}: {one['encode']:7.0f} {one['decode']:7.0f}", flush=True
            )
    triton_quantized._TILE, cuda_quantized.PROGRAMS = chosen
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also try other tiles and numbers of programs")
    args = parser.parse_args()
    began = time.perf_counter()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "combinations_right": check_all(),
        "bar_gbps": BAR,
        "runs": [],
    }
    print(f"{result['combinations_right']} combinations right after {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{'layout':>11} {'codec':>5} {'encode':>7} {'decode':>7} {'gather':>7} {'scatter':>8} {'enqueue ms':>11}")
    for layout, codec in product(("nhd", "halves", "cross_layer"), CODECS):
        bench = Bench(layout, codec)
        run = {"layout": layout, "codec": codec, "encode": bench.kernel(into_rows=True)}
        run |= {"decode": bench.kernel(into_rows=False), **bench.copier()}
        run["meets_bar"] = min(run["encode"], run["decode"]) >= BAR
        result["runs"].append(run)
        args.out.write_text(json.dumps(result, indent=1))
        figures = f"{run['encode']:7.0f} {run['decode']:7.0f} {run['gather']:7.1f} {run['scatter']:8.1f}"
        print(f"{layout:>11} {codec:>5} {figures} {run['enqueue_ms']:11.1f}", flush=True)
    if args.sweep:
        result["sweep"] = sweep()
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
