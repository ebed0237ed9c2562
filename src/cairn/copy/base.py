"""The contract of a copier: paged KV cache <-> rows of block memory."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from cairn.copy.paged import PagedKV, TokenSlots
from cairn.kv import KVGeometry


class Copier(ABC):
    """Moves KV blocks between an engine's paged cache and rows of host memory.

    memory: uint8 [rows, stride], each row at least `geometry.block_bytes`; a row holds a block as
    [layer, plane, token, head, dim] (or an engine's opaque pages, layer by layer). rows: int32 [n]. slots: int64
    [n * block_tokens], where each token stands in the paged cache; negative: that token is left as it is.
    layers: which layers to move, all by default. Calls return when the bytes have moved. Thread-safe for disjoint rows.
    """

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry

    @abstractmethod
    def gather(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        """Paged cache -> rows. Raises InputError for slots outside the cache."""

    @abstractmethod
    def scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        """Rows -> paged cache. Raises InputError for slots outside the cache."""
