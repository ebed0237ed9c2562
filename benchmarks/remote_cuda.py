"""A compressed prompt out of a remote tier, `cachegen` decoded on the CPU and on a GPU, taking turns.

    PYTHONPATH=src python3 benchmarks/remote_cuda.py --out remote_cuda.json                  # one CUDA device, 60 s
    PYTHONPATH=src python3 benchmarks/remote_cuda.py --device cpu --tokens 512 --out FILE    # without a GPU: no figures

Llama-8B's geometry, values drawn channel by channel. One engine stores a prompt into a directory in memory (the store
costs nearly nothing, so what is seen is decoding); for every round one with an empty DRAM and another one load it into
a paged cache of host memory: caller's seconds, and whether both get the same bits. `object_ms`: an object of 32 blocks
alone, 64 MiB, into pinned rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import machine

from cairn.codec.choice import cachegen_on
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


def object_ms(device: str, blocks: torch.Tensor) -> float:
    """Median milliseconds that an object takes to decode."""
    codec = cachegen_on(device, G)
    rows = blocks[:OBJECT_BLOCKS].reshape(min(OBJECT_BLOCKS, len(blocks)), -1).view(torch.uint8).numpy()
    stored = codec.encode(rows)
    out = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    times = []
    for _ in range(2 + ROUNDS):
        began = time.perf_counter()
        assert codec.decode(stored, out)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:]) * 1e3


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
    seconds = {device: statistics.median(times) for device, times in found.items()}
    result = {
        "tokens": options.tokens,
        "bytes": blocks.numel() * 2,
        "stored_bytes": size,
        "seconds": seconds,
        "rounds": found,
        "gb_per_s": {device: blocks.numel() * 2 / taken / 1e9 for device, taken in seconds.items()},
        "object_ms": {device: object_ms(device, blocks) for device in found},
        "same_bits": torch.equal(caches["cpu"].view(torch.int16), caches[options.device].view(torch.int16)),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
