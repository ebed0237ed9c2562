"""What is known of what others have without asking them: what is there and what is not, each for a while."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, Generic, NamedTuple, TypeVar

#: Entries kept, 150 bytes each.
LIMIT: Final = 1 << 16
#: For how long what was not there is not asked about, seconds; and where one engine waits for what another stores now.
ABSENT_S: Final = 2.0
HANDOVER_ABSENT_S: Final = 0.02


V = TypeVar("V")


class _Note(NamedTuple, Generic[V]):
    value: V
    until: float


class Known(Generic[V]):
    """Whether blocks, or objects by their last block, are there, by its 16-byte key. Thread-safe, a microsecond each.

    V: bool, or False for what is not there and something true that tells more of what is. Nothing here is a promise: an
    object may go at any time, and then the read says so (`note`). present_s: how long a found object is taken to be
    there; past that it is asked about again, and written again if it went. absent_s: how long one that was not there is
    not asked about.
    """

    def __init__(
        self, *, present_s: float, absent_s: float, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._present_s = present_s
        self._absent_s = absent_s
        self._limit = limit
        self._clock = clock
        self._notes: OrderedDict[bytes, _Note[V]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._notes)

    def now(self) -> float:
        """The time that `get` takes, for who asks about many."""
        return self._clock()

    def get(self, key: bytes, now: float | None = None) -> V | None:
        """Whether it is there; None: that has to be asked."""
        note = self._notes.get(key)
        return note.value if note is not None and note.until > (now or self._clock()) else None

    def note(self, keys: Iterable[bytes], value: V) -> None:
        """These are there, or are not."""
        note = _Note(value, self._clock() + (self._present_s if value else self._absent_s))
        with self._lock:
            for key in keys:
                self._notes[key] = note
                self._notes.move_to_end(key)
            while len(self._notes) > self._limit:
                self._notes.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._notes.clear()
