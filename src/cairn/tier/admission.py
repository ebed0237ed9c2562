"""Write admission: how many bytes a day a tier may write, and to whom the last of them go.

An SSD endures a number of bytes written. A token bucket holds one day's budget. While it has tokens every block is
written; when it is empty only blocks that were offered before, which are those most likely to come again; and once
these have overdrawn it by another day's budget, none. So a day never costs more than two budgets above the long-run
rate, and the long run never more than the budget.
"""

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel
from cairn.kv import Keys

_DAY_SECONDS = 86_400.0
_ROWS = 4
_MOST = 255

Counters = npt.NDArray[np.uint8]


@kernel
def _count(counters: Counters, keys: Keys, seen: npt.NDArray[np.bool_]) -> None:
    """Counts each key once more; `seen[i]` says whether it had been counted before."""
    mask = np.uint64(counters.shape[1] - 1)
    for i in range(len(keys)):
        least = _MOST
        for row in range(_ROWS):
            word = keys[i, row >> 1] >> np.uint64(32 * (row & 1))
            at = np.int64(word & mask)
            least = min(least, counters[row, at])
            if counters[row, at] < _MOST:
                counters[row, at] += 1
        seen[i] = least > 0


class Sketch:
    """A count-min sketch over keys that forgets: all counts are halved every ten counts a cell (TinyLFU, Einziger et
    al., ACM ToS 2017). Four rows of one byte a cell; keys are digests, so their bits are the hashes. Not thread-safe.
    """

    def __init__(self, expected: int) -> None:
        width = 1 << min(max(10, (2 * expected - 1).bit_length()), 28)
        self._counters: Counters = np.zeros((_ROWS, width), np.uint8)
        self._until_halving = 10 * width

    def count(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Counts the keys [n, 2]; returns which had been counted before [n]. Errs towards yes, and rarely."""
        seen = np.empty(len(keys), np.bool_)
        _count(self._counters, keys, seen)
        self._until_halving -= len(keys)
        if self._until_halving <= 0:
            self._counters >>= 1
            self._until_halving = 10 * self._counters.shape[1]
        return seen


class Admission:
    """Admits blocks of `block_bytes` to a tier of `blocks` blocks. Thread-safe, microseconds a call.

    bytes_per_day: the budget; None admits everything.
    """

    def __init__(
        self,
        bytes_per_day: float | None,
        *,
        block_bytes: int,
        blocks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = bytes_per_day
        self._block_bytes = block_bytes
        self._clock = clock
        self._tokens = bytes_per_day or 0.0
        self._filled_at = clock()
        self._sketch = Sketch(blocks) if bytes_per_day is not None else None
        self._lock = threading.Lock()

    def admit(self, keys: Keys) -> int:
        """How many leading blocks of these (uint64 [n, 2]) may be written now; they are charged for.

        Leading, because a block without its parent is useless.
        """
        if self._budget is None or self._sketch is None:
            return len(keys)
        with self._lock:
            now = self._clock()
            self._tokens += self._budget * (now - self._filled_at) / _DAY_SECONDS
            self._tokens = min(self._tokens, self._budget)
            self._filled_at = now
            seen = self._sketch.count(keys)
            for i in range(len(keys)):
                floor = -self._budget if seen[i] else 0.0
                if self._tokens - self._block_bytes < floor:
                    return i
                self._tokens -= self._block_bytes
        return len(keys)
