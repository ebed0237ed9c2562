"""The contract of a copier: paged KV cache <-> rows of block memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy.paged import PagedKV, TokenSlots
from cairn.copy.progress import Progress
from cairn.kv import KVGeometry


class DeviceRows(NamedTuple):
    """Rows in a GPU's memory, this one's or a peer's that is mapped here: `rows` of `stride` bytes from `address` on.

    peer: another device holds them. Whoever made it keeps the memory mapped while it is used.
    """

    address: int
    rows: int
    stride: int
    peer: bool


#: Where rows stand: host memory, uint8 [rows, stride], or a device's.
RowMemory = npt.NDArray[np.uint8] | DeviceRows


def _nothing() -> None: ...


class Copier(ABC):
    """Moves KV blocks between an engine's paged cache and rows of host or device memory.

    memory: [rows, stride], each row at least `row_geometry.block_bytes`; a row holds a block as
    [layer, plane, token, head, dim] (or an engine's opaque pages, layer by layer). row_geometry: of the rows, which is
    `geometry`, the paged cache's, unless rows are quantized. rows: int32 [n]. slots: int64
    [n * block_tokens], where each token stands in the paged cache; negative: that token is left as it is.
    layers: which layers to move, all by default. Calls return when the bytes have moved. Thread-safe for disjoint rows.
    Raises InputError for memory that the copier cannot reach, StorageError where the device fails.
    """

    def __init__(self, geometry: KVGeometry, row_geometry: KVGeometry | None = None) -> None:
        self.geometry = geometry
        self.row_geometry = row_geometry or geometry

    @abstractmethod
    def gather(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        """Paged cache -> rows. Raises InputError for slots outside the cache."""

    @abstractmethod
    def scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        """Rows -> paged cache. Raises InputError for slots outside the cache."""

    def scatter_layers(
        self, kv: PagedKV, slots: TokenSlots, memory: RowMemory, rows: npt.NDArray[np.int32], progress: Progress
    ) -> None:
        """As `scatter`, layer after layer, beside a model that follows by `progress`, until that is stopped."""
        for group in progress.groups():
            self.scatter(kv, slots, memory, rows, group)

    def start_scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> Callable[[], None]:
        """As `scatter`, but where a device copies, the bytes have moved only when what this returns has returned: it
        must be called, and may raise StorageError.
        """
        self.scatter(kv, slots, memory, rows, layers)
        return _nothing

    def register(self, memory: npt.NDArray[np.uint8]) -> None:  # noqa: B027 - as below: a CPU has nothing to do
        """Makes copies from and to this host memory fast, where there is a way; until `release` or `close`."""

    def release(self, memory: npt.NDArray[np.uint8]) -> None:  # noqa: B027
        """Undoes `register`, once no copy is under way. Idempotent."""

    def prepare(self, kv: PagedKV, *, direct: bool = False) -> None:  # noqa: B027
        """Takes and compiles what copies for `kv` need, so that no request pays for it. direct: rows may be in VRAM."""

    def close(self) -> None:  # noqa: B027
        """Waits for what is under way and gives everything back. Idempotent."""
