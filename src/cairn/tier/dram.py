"""The DRAM tier: an arena of fixed slots, and the index over it."""

import numpy as np
import numpy.typing as npt

from cairn.errors import ConfigError
from cairn.index import EvictionPolicy, PrefixIndex
from cairn.tier.arena import PAGE, Arena
from cairn.tier.base import Rows


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def arena_shape(block_bytes: int, capacity_bytes: int) -> tuple[int, int]:
    """(slots, stride) of an arena of `capacity_bytes`. Raises ConfigError when not even one block fits."""
    stride = round_up(block_bytes, PAGE)
    slots = capacity_bytes // stride
    if slots < 1:
        raise ConfigError(f"storage.cpu.size={capacity_bytes}: must hold at least one KV block of {stride} bytes")
    return slots, stride


class DramTier:
    """KV blocks in host memory: rows of an arena, found through a prefix index.

    capacity_bytes holds exactly; a slot is `block_bytes` rounded up to whole pages, so that a row can be read from and
    written to O_DIRECT files. `arena`: one of `arena_shape` to use instead of one of its own. Thread-safe as its index
    is. Raises ConfigError when not even one block fits.
    """

    name = "dram"

    def __init__(
        self, block_bytes: int, capacity_bytes: int, policy: type[EvictionPolicy], arena: Arena | None = None
    ) -> None:
        slots, stride = arena_shape(block_bytes, capacity_bytes)
        self.block_bytes = block_bytes
        self._arena = arena or Arena(slots, stride)  # first: it says how much is too much
        self.index = PrefixIndex(slots, policy)

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
