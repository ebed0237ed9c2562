"""CacheGen as published and shipped, for comparison: the settings of LMCache 0.5, in our own few lines.

Every token is scaled by its largest channel (all heads together) and rounded to 32 or 16 bins by layer; every channel
of a (layer, plane) gets a table of frequencies over its chunk of 256 tokens, stored as 33 16-bit numbers, and is coded
by itself by an arithmetic coder. The size here is that coder's ideal code length rounded up to bytes, the tables and
the scales (bfloat16); what it spends beyond that (ends of streams, offsets, pickle) is not counted against it.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_MOST_BINS: Final = 32
_TABLE_BYTES: Final = 2 * (_MOST_BINS + 1)
_SCALE_BYTES: Final = 2


class Published(NamedTuple):
    """Bins by layer: 32 in the first `key_fine` layers of K and the first `value_fine` of V, 16 in the others."""

    key_fine: int = 10
    value_fine: int = 2

    def run(self, kv: Floats) -> tuple[Floats, int]:
        """What comes back of kv [layers, 2, tokens, heads, dim], and the bytes it takes."""
        back = np.empty_like(kv)
        size = 0
        for layer in range(kv.shape[0]):
            for plane, fine in enumerate((self.key_fine, self.value_fine)):
                x = kv[layer, plane].reshape(kv.shape[2], -1)
                most = (_MOST_BINS if layer < fine else 16) // 2 - 1
                scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-12)
                symbols = np.rint(x * (most / scale)).astype(np.int32)
                back[layer, plane] = (symbols * (scale / most)).reshape(kv.shape[2:])
                size += _coded_bytes(symbols + most) + x.shape[1] * _TABLE_BYTES + x.shape[0] * _SCALE_BYTES
        return back, size


def _coded_bytes(symbols: npt.NDArray[np.int32]) -> int:
    """Bytes of every channel (column) under its own frequencies, which are those of the chunk."""
    tokens = len(symbols)
    counts = np.stack([(symbols == s).sum(axis=0) for s in range(_MOST_BINS)])
    bits = -(counts * np.log2(np.maximum(counts, 1) / tokens)).sum(axis=0)
    return int(np.ceil(bits / 8).sum())
