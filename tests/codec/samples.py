"""KV-like blocks: channels of very different means and widths, keys that turn, sinks that stick out."""

import numpy as np
import numpy.typing as npt

from cairn.codec.base import Codec
from cairn.codec.calibration import Calibration
from cairn.codec.rotary import Rotary
from cairn.kv import KVGeometry

Octets = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def values(g: KVGeometry, blocks: int, seed: int = 0) -> Floats:
    """float32 [blocks, layers, planes, block_tokens, heads, dim]."""
    rng = np.random.default_rng(seed)
    shape = (g.layers, g.planes, 1, g.kv_heads, g.head_dim)
    width = np.exp(rng.normal(-1, 0.8, shape))
    x = rng.normal(0, 2, shape) * width + rng.normal(0, 1, (blocks, *g.block_shape)) * width
    x[0, :, :, 0] *= 30
    return np.asarray(x, np.float32)


def to_rows(x: Floats, dtype: str) -> Octets:
    """Rows uint8 [blocks, block_bytes] of elements of the dtype."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # type: ignore[assignment]
    elif dtype == "float16":
        x = x.astype(np.float16)  # type: ignore[assignment]
    return np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)


def from_rows(rows: Octets, g: KVGeometry) -> Floats:
    """The inverse of `to_rows`."""
    if g.dtype == "bfloat16":
        x = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        x = rows.view(g.dtype).astype(np.float32)
    return x.reshape(-1, *g.block_shape)


def calibration(g: KVGeometry) -> Calibration:
    """Every plane as sensitive as any other, half of each head turning."""
    return Calibration(
        model="sample",
        sensitivity=((0.02,) * g.planes,) * g.layers,
        rotary=Rotary.from_theta(10000.0, g.head_dim // 4 * 2, first=g.head_dim - g.head_dim // 4 * 2),
    )


def back(codec: Codec, stored: Octets, blocks: int) -> Octets:
    """What a codec makes of stored bytes, in rows with room between them, which must stay as it is."""
    size = codec.geometry.block_bytes
    memory = np.full((blocks, size + 64), 0xA5, np.uint8)
    assert codec.decode(stored, memory)
    assert (memory[:, size:] == 0xA5).all()
    return memory[:, :size].copy()
