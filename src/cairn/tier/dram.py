"""The DRAM tier: one arena of fixed slots, touched once at start-up, and the index over it."""

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from cairn.errors import ConfigError, StorageError
from cairn.index import EvictionPolicy, PrefixIndex
from cairn.tier.base import Rows

PAGE = 4096
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: faults pages in without a store to each


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Arena:
    """Page-aligned anonymous memory, uint8 [slots, stride], faulted in once.

    The first touch of memory costs more than a copy (0.6-1.3 GB/s here), so it is paid at start-up and not by a
    request. Owns the memory until `close`; rows are handed out as views.
    """

    def __init__(self, slots: int, stride: int) -> None:
        size = slots * stride
        try:
            self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise StorageError(
                f"arena of {size} bytes: the system refuses it ({error}); lower storage.cpu.size"
            ) from None
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8).reshape(slots, stride)
        try:
            self._map.madvise(_POPULATE_WRITE)
        except OSError:
            self.memory.reshape(-1)[::PAGE] = 0


class DramTier:
    """KV blocks in host memory: rows of an arena, found through a prefix index.

    capacity_bytes holds exactly; a slot is `block_bytes` rounded up to whole pages, so that a row can be read from and
    written to O_DIRECT files. Thread-safe as its index is. Raises ConfigError when not even one block fits.
    """

    name = "dram"

    def __init__(self, block_bytes: int, capacity_bytes: int, policy: type[EvictionPolicy]) -> None:
        stride = round_up(block_bytes, PAGE)
        slots = capacity_bytes // stride
        if slots < 1:
            raise ConfigError(f"storage.cpu.size={capacity_bytes}: must hold at least one KV block of {stride} bytes")
        self.block_bytes = block_bytes
        self.index = PrefixIndex(slots, policy)
        self._arena = Arena(slots, stride)

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The arena, uint8 [slots, stride]."""
        return self._arena.memory

    def rows(self, ids: npt.NDArray[np.int32]) -> Rows:
        return Rows(self.memory, ids)

    def stats(self) -> dict[str, float]:
        occupancy = self.index.occupancy()
        return {
            "capacity_bytes": self.memory.nbytes,
            "capacity_blocks": self.index.capacity,
            "resident_blocks": occupancy.resident,
            "reserved_blocks": occupancy.reserved,
            "pinned_blocks": self.index.pinned,
            "evicted_blocks_total": self.index.evicted,
        }
