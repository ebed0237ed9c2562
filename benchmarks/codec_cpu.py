"""Codecs on one core: MB/s of bf16 encoded and decoded, `PYTHONPATH=src python3 benchmarks/codec_cpu.py --out FILE`.

Chunks of 256 tokens, 8 layers of Llama-3.1-8B's shape (8 KV heads of 128); drawn values: normal, channels of different
means and widths. CPU time of the one thread, not of the clock, so that others on the machine count little; medians.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cairn.codec.base import Codec
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.levels import LEVELS
from cairn.codec.lossless import Lossless, Packed
from cairn.codec.rotary import Rotary
from cairn.kv import KVGeometry

GEOMETRY = KVGeometry(layers=8, kv_heads=8, head_dim=128, block_tokens=16)
BLOCKS, RUNS = 16, 15
BARS = {"cachegen decode": 300, "packed decode": 1000}


def drawn() -> Any:
    """Rows uint8 [blocks, block_bytes] of bfloat16."""
    g, rng = GEOMETRY, np.random.default_rng(0)
    channels = (1, g.layers, g.planes, 1, g.kv_heads, g.head_dim)
    width = np.exp(rng.normal(-1, 0.6, channels))
    x = (rng.normal(0, 1.5, channels) + rng.normal(0, 1, (BLOCKS, *g.block_shape))) * width
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(BLOCKS, -1).view(np.uint8)


def megabytes_per_s(run: Callable[[], object], size: int) -> float:
    run()
    times = []
    for _ in range(RUNS):
        begin = time.thread_time()
        run()
        times.append(time.thread_time() - begin)
    return round(size / sorted(times)[RUNS // 2] / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    turning = Calibration(
        model="drawn", sensitivity=((0.02, 0.02),) * GEOMETRY.layers, rotary=Rotary.from_theta(5e5, GEOMETRY.head_dim)
    )
    codecs: dict[str, Codec] = {f"cachegen {name}": CacheGen(GEOMETRY, level) for name, level in LEVELS.items()}
    codecs["cachegen high, turning keys"] = CacheGen(GEOMETRY, calibration=turning)
    codecs |= {kind.id: kind(GEOMETRY) for kind in (Lossless, Packed, Int8, Fp8, Int4)}
    rows = drawn()
    out = np.empty_like(rows)
    result: dict[str, Any] = {}
    for name, codec in codecs.items():
        stored = codec.encode(rows)
        result[name] = {
            "bits": round(16 * len(stored) / rows.size, 3),
            "encode_mb_per_s": megabytes_per_s(lambda codec=codec: codec.encode(rows), rows.size),
            "decode_mb_per_s": megabytes_per_s(lambda codec=codec, stored=stored: codec.decode(stored, out), rows.size),
        }
    where = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    report = {"codecs": result, "bars": BARS, **where, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
