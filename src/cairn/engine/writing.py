"""A writer's hold: rows reserved for the blocks of a chain that DRAM lacks, published in order."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt

from cairn.index import PrefixIndex
from cairn.kv import Keys
from cairn.node.base import Home, Memory
from cairn.observe.reasons import Reason

#: Told of every commit: (how many leading blocks of the chain are published, how many of them are new).
Committed = Callable[[int, int], None]


class Writing(ABC):
    """Two-phase write of blocks first.. of a chain: fill `rows`, `commit` them piece by piece, `end`.

    Nothing of it can be found before its commit. The block before the next one to commit is pinned all the while, so
    that making room for the tail never evicts the head it hangs from. Owned by one request; `end` is idempotent.
    `reason`: why there are fewer rows than blocks. `home`: see `Home`.
    """

    first: int
    rows: npt.NDArray[np.int32]
    reason: Reason = Reason.NO_SLOT
    home: Home | None = None

    @abstractmethod
    def access(self) -> AbstractContextManager[Memory | None]:
        """The arena, in which `rows` may be written while the context lasts. None: they are this writer's no more."""

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
        self._index = index
        self._keys = keys
        self._committed = committed
        self._done = 0
        self.first = index.touch(keys)
        self._parent = index.pin(keys[max(0, self.first - 1) : self.first], use=False)
        lost = self.first > 0 and not len(self._parent)
        self.rows = index.reserve(0 if lost else len(keys) - self.first)

    def access(self) -> AbstractContextManager[Memory | None]:
        return nullcontext(self._memory)

    def commit(self, count: int) -> int:
        start, stop = self.first + self._done, self.first + self._done + count
        new = int(np.count_nonzero(self._index.commit(self._keys, start, self.rows[self._done : self._done + count])))
        self._done += count
        last = self._index.pin(self._keys[stop - 1 : stop], use=False)
        self._index.unpin(self._parent)
        self._parent = last
        self._committed(stop, new)
        return new

    def end(self) -> None:
        self._index.free(self.rows[self._done :])
        self._done = len(self.rows)
        self._index.unpin(self._parent)
        self._parent = self._parent[:0]
