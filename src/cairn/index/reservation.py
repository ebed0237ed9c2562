"""Slots reserved for the blocks of a chain that an index lacks, published in order."""

import numpy as np

from cairn.index.prefix import PrefixIndex
from cairn.index.slots import Keys


class Reservation:
    """Blocks first.. of a chain are `rows[0]..`: `commit` them piece by piece, then `end`.

    The block before the next one to commit is pinned all the while, so that making room for the tail never evicts the
    head it hangs from. Counts a use of the blocks that are there. Owned by one writer.
    """

    def __init__(self, index: PrefixIndex, keys: Keys) -> None:
        self._index = index
        self._keys = keys
        self._done = 0
        self.first = index.touch(keys)
        self._parent = index.pin(keys[max(0, self.first - 1) : self.first], use=False)
        lost = self.first > 0 and not len(self._parent)
        self.rows = index.reserve(0 if lost else len(keys) - self.first)

    @property
    def published(self) -> int:
        """How many leading blocks of the chain are, as far as this writer knows."""
        return self.first + self._done

    def commit(self, count: int) -> int:
        """Publishes the next `count` rows; returns how many blocks are new (others have stored the rest meanwhile)."""
        start, stop = self.first + self._done, self.first + self._done + count
        new = int(np.count_nonzero(self._index.commit(self._keys, start, self.rows[self._done : self._done + count])))
        self._done += count
        last = self._index.pin(self._keys[stop - 1 : stop], use=False)
        self._index.unpin(self._parent)
        self._parent = last
        return new

    def end(self) -> None:
        """Gives back what was not committed. Idempotent."""
        self._index.free(self.rows[self._done :])
        self._done = len(self.rows)
        self._index.unpin(self._parent)
        self._parent = self._parent[:0]
