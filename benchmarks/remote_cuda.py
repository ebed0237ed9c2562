"""A compressed prompt out of a remote tier, `cachegen` decoded on the CPU and on a GPU, taking turns.

    PYTHONPATH=src python3 benchmarks/remote_cuda.py --out remote_cuda.json                  # one CUDA device, 60 s
    PYTHONPATH=src python3 benchmarks/remote_cuda.py --device cpu --tokens 512 --out FILE    # without a GPU: no figures

Llama-8B's geometry, values drawn channel by channel. One engine stores a prompt into a directory in memory (the store
costs nearly nothing, so what is seen is decoding); for every round one with an empty DRAM and another one load it into
a paged cache of host memory: caller's seconds, and whether both get the same bits. `object_ms`: an object of 32 blocks,
64 MiB, decoded into pinned rows and encoded from them, alone; and encoded by as many threads as there are cores, wall
time by objects. `same_streams`: whether both make the same bytes of it, and of small ones of every dtype, of keys that
turn or do not, one plane or two, with values that are not finite.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import machine

from cairn.codec.calibration import Calibration
from cairn.codec.choice import cachegen_on
from cairn.codec.levels import LEVELS
from cairn.codec.rotary import Rotary
from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.kv import KVGeometry, Namespace

G = KVGeometry(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
ROUNDS, OBJECT_BLOCKS = 5, 32


def pages(tokens: int) -> torch.Tensor:
    """Blocks [n, layers, planes, block_tokens, heads, dim] of drawn values, channels of different widths and means."""
    generator = torch.Generator().manual_seed(0)
    shape = (G.layers, G.planes, 1, G.kv_heads, G.head_dim)
    width = torch.exp(torch.randn(shape, generator=generator) * 0.6 - 1)
    mean = torch.randn(shape, generator=generator) * width
    blocks = torch.empty((tokens // G.block_tokens, *G.block_shape), dtype=torch.bfloat16)
    for block in blocks:
        block.copy_(torch.randn(G.block_shape, generator=generator) * width + mean)
    return blocks


def engine(home: str, device: str, tokens: int) -> CacheEngine:
    overrides = {
        "storage.cpu.size": (tokens // G.block_tokens + 8) * G.block_bytes,
        "storage.remote.url": f"file://{home}",
        "storage.remote.linger_s": 0.1,
        "compression.algorithm": "cachegen",
        "compression.device": device,
        "autopilot.codec": "always",
        "autopilot.load": "always",
        "engine.timeout_s": 120,
        "engine.lease_s": 120,
    }
    return CacheEngine(Namespace(model="bench", geometry=G), load_config(environ={}, overrides=overrides))


def median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(2 + ROUNDS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:]) * 1e3


def object_ms(device: str, rows: Any) -> tuple[dict[str, float], bytes]:
    """Milliseconds that an object takes, and its stream. rows: uint8 [blocks, block_bytes], pinned."""
    codec, cores = cachegen_on(device, G), os.cpu_count() or 1
    stored = codec.encode(rows)
    out = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    assert codec.decode(stored, out)
    took = {"decode": median_ms(lambda: codec.decode(stored, out)), "encode": median_ms(lambda: codec.encode(rows))}
    with ThreadPoolExecutor(cores) as pool:
        together = median_ms(lambda: list(pool.map(lambda _: len(codec.encode(rows)), range(2 * cores))))
    return took | {"encode_all_cores": together / (2 * cores)}, stored.tobytes()


def same_streams(device: str) -> bool:
    """Whether a device writes what the CPU does, for small blocks of all kinds."""
    rng, same = np.random.default_rng(0), True
    for dtype, planes, turns, level in product(("bfloat16", "float16", "float32"), (1, 2), (0, 24), LEVELS.values()):
        g = KVGeometry(layers=2, kv_heads=5 if planes == 2 else 1, head_dim=72, dtype=dtype, planes=planes)
        known = Calibration(model="x", sensitivity=((0.02,) * planes,) * 2, rotary=Rotary.from_theta(1e4, 2 * turns))
        x = rng.normal(1, 1, (8, *g.block_shape)) * np.exp(rng.normal(0, 1, g.block_shape[3:]))
        x.reshape(-1)[rng.integers(0, x.size, 6)] = [np.nan, np.inf, 9e4, -1e30, 0, 1]
        rows = torch.from_numpy(x).to(getattr(torch, dtype)).reshape(8, -1).view(torch.uint8).numpy()
        codecs = (cachegen_on(name, g, level, known if turns else None) for name in ("cpu", device))
        same = same and len({codec.encode(rows, sinks=8).tobytes() for codec in codecs}) == 1
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda", help="beside the CPU.")
    options = parser.parse_args()
    blocks, slots = pages(options.tokens), np.arange(options.tokens)
    prompt = np.random.default_rng(0).integers(0, 1 << 17, options.tokens)
    found: dict[str, list[float]] = {"cpu": [], options.device: []}
    caches: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        with engine(home, "cpu", options.tokens) as writer:
            stored = writer.store(prompt, None, writer.register_kv_caches([blocks], "cross_layer"), slots)
            assert stored == options.tokens, stored
            assert writer.flush(240)
        size = sum(path.stat().st_size for path in Path(home).rglob("*") if path.is_file())
        for _ in range(ROUNDS):
            for device in found:
                with engine(home, device, options.tokens) as reader:
                    caches[device] = torch.zeros_like(blocks)
                    kv = reader.register_kv_caches([caches[device]], "cross_layer")
                    began = time.perf_counter()
                    mask: Any = reader.retrieve(prompt, None, kv, slots)
                    found[device].append(time.perf_counter() - began)
                    assert mask.all(), (device, int(mask.sum()))
    rows = torch.empty((min(OBJECT_BLOCKS, len(blocks)), G.block_bytes), dtype=torch.uint8)
    rows = rows.pin_memory() if torch.cuda.is_available() else rows
    rows.copy_(blocks[: len(rows)].reshape(len(rows), -1).view(torch.uint8))
    objects = {device: object_ms(device, rows.numpy()) for device in found}
    seconds = {device: statistics.median(times) for device, times in found.items()}
    result = {
        "tokens": options.tokens,
        "bytes": blocks.numel() * 2,
        "stored_bytes": size,
        "seconds": seconds,
        "rounds": found,
        "gb_per_s": {device: blocks.numel() * 2 / taken / 1e9 for device, taken in seconds.items()},
        "object_ms": {device: took for device, (took, _) in objects.items()},
        "same_streams": len({stream for _, stream in objects.values()}) == 1 and same_streams(options.device),
        "same_bits": torch.equal(caches["cpu"].view(torch.int16), caches[options.device].view(torch.int16)),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
