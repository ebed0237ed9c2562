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
_HASHES = 4
_BITS_A_KEY = 16
_REMEMBERED = 4  # times the tier's blocks

Bits = npt.NDArray[np.uint64]


@kernel
def _sight(young: Bits, old: Bits, keys: Keys, seen: npt.NDArray[np.bool_]) -> None:
    """Enters each key into `young`; `seen[i]` says whether either filter had it."""
    mask = np.uint64(64 * len(young) - 1)
    one, low, shift = np.uint64(1), np.uint64(63), np.uint64(6)
    for i in range(len(keys)):
        in_young, in_old = True, True
        for part in range(_HASHES):
            bit = (keys[i, part >> 1] >> np.uint64(32 * (part & 1))) & mask
            word, flag = np.int64(bit >> shift), one << (bit & low)
            in_young = in_young and (young[word] & flag) != 0
            in_old = in_old and (old[word] & flag) != 0
            young[word] |= flag
        seen[i] = in_young or in_old


class Sightings:
    """Which keys were seen lately, in bounded memory: two Bloom filters, the older emptied when the younger is full.

    Remembers the latest `expected` keys at least and twice as many at most, in 4 to 8 bytes each; errs towards "seen",
    in less than 1 % of cases. Counts would say no more: whether a block ever came again is all that is asked. Keys are
    digests, so their bits are the hashes. Not thread-safe.
    """

    def __init__(self, expected: int) -> None:
        bits = 1 << min(max(10, (expected * _BITS_A_KEY - 1).bit_length()), 32)
        self._young: Bits = np.zeros(bits // 64, np.uint64)
        self._old: Bits = np.zeros(bits // 64, np.uint64)
        self._room = self._expected = min(expected, bits // _BITS_A_KEY)

    def sight(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Enters the keys [n, 2]; returns which had been seen before [n]."""
        seen = np.empty(len(keys), np.bool_)
        for start in range(0, len(keys), self._expected):
            part = keys[start : start + self._expected]
            if len(part) > self._room:
                self._young, self._old = self._old, self._young
                self._young[:] = 0
                self._room = self._expected
            _sight(self._young, self._old, part, seen[start : start + self._expected])
            self._room -= len(part)
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
        self._sightings = Sightings(_REMEMBERED * max(blocks, 1024)) if bytes_per_day is not None else None
        self._lock = threading.Lock()

    def admit(self, keys: Keys) -> int:
        """How many leading blocks of these (uint64 [n, 2]) may be written now; they are charged for.

        Leading, because a block without its parent is useless.
        """
        if self._budget is None or self._sightings is None:
            return len(keys)
        with self._lock:
            now = self._clock()
            self._tokens += self._budget * (now - self._filled_at) / _DAY_SECONDS
            self._tokens = min(self._tokens, self._budget)
            self._filled_at = now
            seen = self._sightings.sight(keys)
            for i in range(len(keys)):
                floor = -self._budget if seen[i] else 0.0
                if self._tokens - self._block_bytes < floor:
                    return i
                self._tokens -= self._block_bytes
        return len(keys)
