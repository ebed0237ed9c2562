"""The identity codec: stored bytes are the blocks' bytes, as they stand in the rows or in the canonical order."""

import numpy as np

from cairn.codec.base import Codec, Octets
from cairn.kv import CANONICAL, KVGeometry, Layout


class Raw(Codec):
    """Moves no bytes of one block: encode returns the block itself, and decode leaves it alone when given as both.

    layout: of the rows, and so of what is stored; rows of another do not read it.
    """

    id = "raw"
    lossless = True

    def __init__(self, geometry: KVGeometry, layout: Layout = CANONICAL) -> None:
        super().__init__(geometry)
        self._parameters = layout.digest()

    @property
    def parameters(self) -> bytes:
        return self._parameters

    def stored_bytes_limit(self, blocks: int = 1) -> int:
        return blocks * self.geometry.block_bytes

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        return blocks if blocks.ndim == 1 else self.plain(self.rows(blocks))

    def decode(self, stored: Octets, out: Octets) -> bool:
        return stored is out or self.put_plain(stored, self.rows(out))


class Reordered(Raw):
    """Canonical bytes of blocks whose rows have another layout: what `Raw` makes of canonical rows, and reads."""

    def __init__(self, geometry: KVGeometry, layout: Layout) -> None:
        super().__init__(geometry)
        layout.check(geometry)
        self._layout = layout

    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        rows = self.rows(blocks)
        stored = np.empty(rows.shape, np.uint8)
        for row, block in zip(rows, stored, strict=True):
            self._layout.to_canonical(row, block, self.geometry)
        return stored.reshape(-1)

    def decode(self, stored: Octets, out: Octets) -> bool:
        rows = self.rows(out)
        if stored.size != rows.size:
            return False
        blocks = (stored.copy() if np.may_share_memory(stored, out) else stored).reshape(rows.shape)
        for block, row in zip(blocks, rows, strict=True):
            self._layout.from_canonical(block, row, self.geometry)
        return True


def canonical_codec(geometry: KVGeometry, layout: Layout) -> Raw:
    """Stores canonical bytes of rows of any layout."""
    return Raw(geometry) if layout == CANONICAL else Reordered(geometry, layout)
