"""What sources are about to hold: prompts that were routed to them, until events tell or the time is up.

Between a routing decision and the first event about it lies a prefill; whoever asks meanwhile for the same prompt would
be sent elsewhere. An entry is (source, key) -> deadline in a fixed, set-associative table. A decision enters a whole
chain, so any entry that lives proves all that come before it, whatever was overwritten: bisection may find less than
was routed, never more.
"""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cairn.errors import InputError
from cairn.fleet.base import Source
from cairn.fleet.chains import Hashed
from cairn.jit import kernel
from cairn.kv import Keys

_ENTRY = np.dtype([("key0", np.uint64), ("key1", np.uint64), ("deadline", np.float64)])
_WAYS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Entries = npt.NDArray[np.void]


@kernel
def _first(entries: Entries, key0: np.uint64) -> int:
    return int(np.int64(key0 & np.uint64(len(entries) // _WAYS - 1))) * _WAYS


@kernel
def _lives(entries: Entries, number: int, keys: Keys, block: int, now: float) -> bool:
    key0 = keys[block, 0] ^ (np.uint64(number + 1) * _GOLDEN)
    first = _first(entries, key0)
    for at in range(first, first + _WAYS):
        if entries[at].key0 == key0 and entries[at].key1 == keys[block, 1]:
            return bool(entries[at].deadline > now)
    return False


@kernel
def _enter(entries: Entries, number: int, keys: Keys, deadline: float) -> None:
    """Enters all keys, in the place of the entry that ends first."""
    for block in range(len(keys)):
        key0 = keys[block, 0] ^ (np.uint64(number + 1) * _GOLDEN)
        first = _first(entries, key0)
        place = first
        for at in range(first, first + _WAYS):
            if entries[at].key0 == key0 and entries[at].key1 == keys[block, 1]:
                place = at
                break
            if entries[at].deadline < entries[place].deadline:
                place = at
        entries[place].key0 = key0
        entries[place].key1 = keys[block, 1]
        entries[place].deadline = deadline


@kernel
def _leading(
    entries: Entries, numbers: npt.NDArray[np.int64], keys: Keys, now: float, found: npt.NDArray[np.int64]
) -> None:
    """found[i] = how many leading keys the source with numbers[i] is about to hold."""
    for i in range(len(numbers)):
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if _lives(entries, numbers[i], keys, middle, now):
                low = middle + 1
            else:
                high = middle
        found[i] = low


class Speculation:
    """Routing decisions of the last `seconds`, by `clock` (in seconds); room: blocks remembered at most, 24 bytes each,
    rounded up to a power of two.

    Thread-safe. Raises InputError for a duration or room that is not positive.
    """

    def __init__(
        self, seconds: float = 2.0, *, room: int = 1 << 18, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds <= 0 or room < 1:
            raise InputError(f"seconds={seconds}, room={room}: must be positive")
        self._seconds = seconds
        self._clock = clock
        self._entries: Entries = np.zeros(max(_WAYS, 1 << (room - 1).bit_length()), _ENTRY)
        self._entries["deadline"] = -np.inf
        self._numbers: dict[Source, int] = {}
        self._given = 0
        self._lock = threading.Lock()

    def routed(self, source: Source, prompt: Sequence[Hashed]) -> None:
        """A prompt goes to `source`. prompt: its keys in the block sizes that the source uses, `FleetIndex.hashed`."""
        with self._lock:
            if source not in self._numbers:
                self._numbers[source] = self._given
                self._given += 1
            for _, keys in prompt:
                _enter(self._entries, self._numbers[source], keys, self._clock() + self._seconds)

    def forget(self, source: Source) -> None:
        """The source is gone, and what was sent to it is lost."""
        with self._lock:
            self._numbers.pop(source, None)

    def tokens(self, sources: Sequence[Source], prompt: Sequence[Hashed]) -> npt.NDArray[np.int64]:
        """How many leading tokens of a prompt each source is about to hold, [len(sources)]."""
        most = np.zeros(len(sources), np.int64)
        with self._lock:
            known = [i for i, source in enumerate(sources) if source in self._numbers]
            numbers = np.array([self._numbers[sources[i]] for i in known], np.int64)
            found = np.zeros(len(known), np.int64)
            for block_tokens, keys in prompt if known else ():
                _leading(self._entries, numbers, keys, self._clock(), found)
                most[known] = np.maximum(most[known], block_tokens * found)
        return most

    def covers(self, sources: Sequence[Source], begun: Hashed) -> bool:
        """Whether any of the sources is about to hold all of these blocks, one at least."""
        return bool(self.tokens(sources, (Hashed(1, begun.keys[-1:]),)).any())
