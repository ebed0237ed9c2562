"""The identity codec: stored bytes are the blocks' bytes."""

import numpy as np

from cairn.codec.base import Codec, Octets


class Raw(Codec):
    """Moves no bytes of one block: encode returns the block itself, and decode leaves it alone when given as both."""

    id = "raw"
    lossless = True

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        return blocks * self.geometry.block_bytes

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        return blocks if blocks.ndim == 1 else np.ascontiguousarray(self.rows(blocks)).reshape(-1)

    def decode(self, stored: Octets, out: Octets) -> bool:
        rows = out if out.ndim == 1 else self.rows(out)
        if stored.size != rows.size:
            return False
        if stored is not out:
            rows[:] = stored.reshape(rows.shape)
        return True
