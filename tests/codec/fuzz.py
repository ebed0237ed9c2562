"""Hostile streams: `python -m tests.codec.fuzz [count]`, with NUMBA_BOUNDSCHECK=1 a read or write out of bounds raises.

Streams of every codec are cut, lengthened, spliced, and have bits, words and numbers changed. A decoder either refuses,
or fills the rows; it never raises, never touches the bytes around the rows, and never takes long. A count of 100,000 is
the full run.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np

from cairn.codec.base import Codec
from cairn.codec.cachegen import CacheGen
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.lossless import Lossless, Packed
from cairn.codec.raw import Raw
from cairn.kv import KVGeometry
from tests.codec import samples

GEOMETRIES = [
    KVGeometry(layers=2, kv_heads=2, head_dim=20, block_tokens=4),
    KVGeometry(layers=1, kv_heads=1, head_dim=33, dtype="float32", block_tokens=3, planes=1),
]
BLOCKS = 3
NUMBERS = [0, 1, 2, 3, 4, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) - 4]


def codecs() -> Iterator[tuple[Codec, samples.Octets]]:
    """Every codec with a stream of its own."""
    for g in GEOMETRIES:
        rows = samples.to_rows(samples.values(g, BLOCKS), g.dtype)
        for codec in (
            CacheGen(g, calibration=samples.calibration(g)),
            CacheGen(g),
            Lossless(g),
            Packed(g),
            Int8(g),
            Int4(g),
            Fp8(g),
            Raw(g),
        ):
            yield codec, codec.encode(rows)
        yield CacheGen(g), CacheGen(g).encode(rows, sinks=5)


def mutate(stream: samples.Octets, rng: np.random.Generator) -> samples.Octets:
    """A stream that is not quite one any more."""
    out = stream.copy()
    for _ in range(rng.integers(1, 4)):
        if len(out) < 8:
            return out
        # The parts before the words are where lengths and places stand.
        at = int(rng.integers(0, len(out) if rng.random() < 0.5 else min(len(out), 600)))
        kind = rng.integers(0, 6)
        if kind == 0:
            out[at] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            out[at] = rng.integers(0, 256)
        elif kind == 2:
            at = min(at // 4 * 4, len(out) // 4 * 4 - 4)
            out[at : at + 4] = np.array([rng.choice(NUMBERS)], np.uint32).view(np.uint8)
        elif kind == 3:
            out = out[: at // (4 if rng.random() < 0.7 else 1)].copy()
        elif kind == 4:
            out = np.concatenate([out, rng.integers(0, 256, 4 * int(rng.integers(1, 9)), np.uint8)])
        else:
            size = int(rng.integers(1, 64))
            part = out[at : at + size].copy()
            to = int(rng.integers(0, len(out)))
            out[to : to + len(part)] = part[: len(out) - to]
        if len(out) >= 20 and rng.random() < 0.8:  # a length that fits gets further
            where = 16 if out[:4].tobytes() == b"CKV1" else 12
            out[where : where + 4] = np.array([len(out)], np.uint32).view(np.uint8)
    return out


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """(refused, taken) of `count` streams. Raises AssertionError, or what the decoder raised."""
    rng = np.random.default_rng(seed)
    every = list(codecs())
    refused = 0
    for i in range(count):
        codec, stream = every[i % len(every)]
        size = codec.geometry.block_bytes
        memory = np.full((BLOCKS, size + 16), 0xA5, np.uint8)
        if i % 17 == 0:
            data = rng.integers(0, 256, int(rng.integers(0, 400)), np.uint8)
        else:
            data = mutate(stream, rng)
        begin = time.monotonic()
        refused += not codec.decode(data, memory)
        assert (memory[:, size:] == 0xA5).all(), "wrote beyond the rows"
        assert i < 2 * len(every) or time.monotonic() - begin < 5, "took too long"
    return refused, count - refused


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print("{} refused, {} taken".format(*fuzz(wanted, 1)))  # noqa: T201
