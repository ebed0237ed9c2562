"""The contract of a codec: the canonical bytes of KV blocks <-> the bytes that are stored."""

from abc import ABC, abstractmethod
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.kv import KVGeometry

#: Leading tokens that attention sinks on (Xiao et al., arXiv 2309.17453); they are kept exact where a sequence begins.
SINK_TOKENS: Final = 8

#: Bytes in host memory, uint8 [n] contiguous, or rows uint8 [blocks, stride] whose last axis is contiguous.
Octets = npt.NDArray[np.uint8]


class Codec(ABC):
    """Turns blocks of one geometry into stored bytes and back.

    Blocks are given as one, uint8 [geometry.block_bytes], or as rows, uint8 [blocks, >= geometry.block_bytes], in the
    canonical layout [layer, k|v, token, head, dim]; the rows are neighbours in one sequence, the earliest first.

    id: what the object frame names it by, unique for ever. lossless: decode gives back every bit. parameters: whatever
    beside the id a reader must share to read the stored bytes, as the frame carries it; two codecs read each other's
    objects exactly when id, parameters and geometry are equal. What only the writer chooses (a level) is not in it: a
    stream tells it itself. Thread-safe: encode and decode run in the tiers' workers.
    """

    id: ClassVar[str]
    lossless: ClassVar[bool]

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry

    @property
    def parameters(self) -> bytes:
        return b""

    @abstractmethod
    def stored_bytes_limit(self, blocks: int = 1) -> int:
        """The most bytes `encode` can return for so many blocks; what a reader takes memory for."""

    @abstractmethod
    def encode(self, blocks: Octets, *, sinks: int = 0) -> Octets:
        """The stored form of the blocks, uint8 [n]. May be `blocks` itself, which the caller then keeps untouched for
        as long as it uses the result. sinks: leading tokens that a codec which loses anything keeps exact all the same;
        `SINK_TOKENS` where the first block begins a sequence. Raises InputError for memory of another shape."""

    @abstractmethod
    def decode(self, stored: Octets, out: Octets) -> bool:
        """Fills `out`, one block or rows, with the blocks that `stored` was made of, as many as `out` has.

        For one block `out` may be the memory of `stored` itself if the codec is `raw`. Returns False, `out` undefined,
        if `stored` is not what `encode` returns for so many blocks. Never raises for what `stored` holds, and touches
        no memory beyond `stored` and `out`.
        """

    def rows(self, blocks: Octets) -> Octets:
        """`blocks` as rows uint8 [n, >= block_bytes]: a view. Raises InputError for another shape.

        Not cut to the block's bytes: kernels are compiled for contiguous arrays, which an arena's rows are, and parts
        of them are not.
        """
        rows = blocks[np.newaxis] if blocks.ndim == 1 else blocks
        size = self.geometry.block_bytes
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < size or (blocks.ndim == 1 and len(blocks) != size):
            raise InputError(f"blocks of shape {blocks.shape}: must be [{size}] or [blocks, {size} or more] bytes")
        if rows.strides[1] != 1:
            raise InputError(f"blocks with a stride of {rows.strides[1]} bytes: a block must be contiguous")
        return rows if rows.shape[1] % self.geometry.element_bytes == 0 else rows[:, :size]

    def plain(self, rows: Octets) -> Octets:
        """The bytes of the blocks in `rows`, one behind the other, uint8 [n]."""
        return rows[:, : self.geometry.block_bytes].reshape(-1)

    def put_plain(self, stored: Octets, rows: Octets) -> bool:
        """The inverse of `plain`; False for another number of bytes."""
        size = self.geometry.block_bytes
        if stored.size != len(rows) * size:
            return False
        rows[:, :size] = stored.reshape(len(rows), size)
        return True
