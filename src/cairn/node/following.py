"""What a session has still to be told of a tier's coming and going."""

from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.index.journal import Changes, Journal
from cairn.node.wire import Changed, WireError, raw_of

#: Blocks in one frame, each way.
_PART: Final = 1 << 15


class Following:
    """One tier, followed for one session by a journal of its own. For the node's loop alone. asked: whether the client
    waits for the next changes.

    A client that is slow loses nothing and costs nothing more: until it asks, nothing is taken out of the journal,
    which has a fixed size and is a difference. So `silence` is about the latest changes, as the journal wants it.
    """

    def __init__(self, number: int, journal: Journal) -> None:
        self.number = number
        self.journal = journal
        self.asked = False
        self._parts: deque[Changed] = deque()

    def next(self) -> Changed | None:
        """What is to be sent now, if anything is."""
        if not self.asked:
            return None
        if not self._parts:
            self._parts.extend(_parts(self.number, self.journal.changes()))
        if not self._parts:
            return None
        self.asked = False
        return self._parts.popleft()

    def silence(self, rows: npt.NDArray[np.int32]) -> None:
        """Raises WireError for what is no row of the tier."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.journal.capacity:
            raise WireError(f"rows {rows.min()}..{rows.max()} of a tier that has {self.journal.capacity}")
        self.journal.silence(rows)

    def end(self) -> None:
        self.journal.end()


def _parts(number: int, changes: Changes) -> Iterator[Changed]:
    for at in range(0, max(len(changes.stored), len(changes.removed)), _PART):
        part = slice(at, at + _PART)
        yield Changed(number, raw_of(changes.stored[part]), raw_of(changes.slots[part]), raw_of(changes.removed[part]))
