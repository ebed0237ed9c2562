"""A writer's hold: rows reserved for the blocks of a chain that DRAM lacks, published in order."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt

from cairn.copy import RowMemory
from cairn.index import PrefixIndex, Reservation
from cairn.kv import Keys
from cairn.node.base import Home, Memory, VramHome
from cairn.observe.reasons import Reason

#: Told of every commit: (how many leading blocks of the chain are published, how many of them are new).
Committed = Callable[[int, int], None]


class Writing(ABC):
    """Two-phase write of blocks first.. of a chain: fill `rows`, `commit` them piece by piece, `end`.

    Nothing of it can be found before its commit. The block before the next one to commit is pinned all the while, so
    that making room for the tail never evicts the head it hangs from. Owned by one request; `end` is idempotent.
    `reason`: why there are fewer rows than blocks. `home`: see `Home`. `tier`: where the rows are. `lost`: the latest
    commit could not be made, and no other will be.
    """

    tier: str = "dram"

    first: int
    rows: npt.NDArray[np.int32]
    reason: Reason = Reason.NO_SLOT
    home: Home | VramHome | None = None
    lost: bool = False

    @abstractmethod
    def access(self) -> AbstractContextManager[RowMemory | None]:
        """The memory, in which `rows` may be written while the context lasts. None: they are this writer's no more."""

    @abstractmethod
    def commit(self, count: int) -> int:
        """Publishes the next `count` rows; returns how many blocks are new (others have stored the rest meanwhile)."""

    @abstractmethod
    def end(self) -> None:
        """Gives back what was not committed."""


class LocalWriting(Writing):
    """A write into this process's own DRAM tier."""

    def __init__(self, index: PrefixIndex, keys: Keys, committed: Committed, memory: Memory) -> None:
        self._memory = memory
        self._committed = committed
        self._reservation = Reservation(index, keys)
        self.first, self.rows = self._reservation.first, self._reservation.rows

    def access(self) -> AbstractContextManager[Memory | None]:
        return nullcontext(self._memory)

    def commit(self, count: int) -> int:
        new = self._reservation.commit(count)
        self._committed(self._reservation.published, new)
        return new

    def end(self) -> None:
        self._reservation.end()
