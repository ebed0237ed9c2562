"""What one source calls its blocks: engine hash -> block and its copies, in 12 bytes an entry at a load of 50 to 85 %.

A table of its own for each source, because engines of different seeds call the same block differently, and because a
source that dies must cost only what it held. Its size is no power of two: doubling would leave half of what is the
bulk of the fleet's memory empty. Not thread-safe; the index's writers take turns.

Copies are counted in the entry itself, so that they end with the name, whatever ends it.
"""

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cairn.index.slots import NONE
from cairn.jit import advise, kernel, prefetch

#: What an engine calls a block.
EngineHash = bytes | int

Hashes = npt.NDArray[np.uint64]
SlotIds = npt.NDArray[np.int32]

#: Open addressing with linear probing, no tombstones. `next`: the block's slot + 1 in the low 28 bits, 0: no entry; how
#: many copies there are beyond the first in the high 4. Packed: an entry that lies across two cache lines costs less
#: than a third more memory.
_NAME = np.dtype([("hash", np.uint64), ("next", np.uint32)])
_NAME_BYTES = _NAME.itemsize
assert _NAME_BYTES == 12

Names = npt.NDArray[np.void]

SLOT_BITS = 28
"""Names can lead to fewer than 2**28 blocks."""
MOST_COPIES = 15
"""Copies of a block, beyond the first, that are counted."""

_SLOT, _COPY = np.uint32((1 << SLOT_BITS) - 1), np.uint32(1 << SLOT_BITS)

FULL, GROWN = 0.85, 0.5
_LEAST = 16

#: Tables of so many bytes lie in memory that nobody has touched yet.
_UNTOUCHED = 1 << 16
_PAGE, _POPULATE_WRITE = mmap.PAGESIZE, 23  # MADV_POPULATE_WRITE, Linux 5.14

_MASK = (1 << 64) - 1
_SHORTEST = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)


def hashes_of(hashes: Sequence[EngineHash]) -> Hashes | None:
    """Names [n] for a source's own table: 64 bits of each hash, the last ones as vLLM shortens it; None: no hashes."""
    try:
        return _words(hashes)
    except TypeError:
        return None


def _words(hashes: Sequence[EngineHash]) -> Hashes:
    kinds = set(map(type, hashes))
    if kinds == {int}:
        try:
            return np.array(hashes, np.uint64)
        except OverflowError:  # signed, or of more than 64 bits
            return np.array([one & _MASK for one in hashes], np.uint64)  # type: ignore[operator]
    if kinds == {bytes}:
        lengths = set(map(len, hashes))  # type: ignore[arg-type]
        if len(lengths) == 1 and (length := lengths.pop()) >= _SHORTEST:
            rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, length)  # type: ignore[arg-type]
            return np.ascontiguousarray(rows[:, -8:]).view(">u8").reshape(-1).astype(np.uint64)
    return np.array([_word(one) for one in hashes], np.uint64)


def hash_of(one: EngineHash) -> np.uint64:
    """The name of one block, as in `hashes_of`. Raises TypeError for what is no hash."""
    return np.uint64(_word(one))


def _word(one: EngineHash) -> int:
    return int.from_bytes(one[-8:], "big") if isinstance(one, bytes) else one & _MASK


def new_names(count: int, load: float = GROWN) -> Names:
    """An empty table that holds `count` names at this load, which is at most FULL."""
    names = np.zeros(max(_LEAST, int(count / load) + 1), _NAME)
    if names.nbytes >= _UNTOUCHED:
        _populate(names)
    return names


def has_room(names: Names, count: int) -> bool:
    """Whether the table may hold `count` names in all."""
    return count <= FULL * len(names)


@kernel
def _populate(names: Names) -> None:
    """Has the system map all pages now, if it can: names are looked for before they are written, all over the table,
    and a page that is read first is faulted in twice, at several times the cost.
    """
    base = int(np.int64(names.ctypes.data))
    first = -(-base // _PAGE) * _PAGE
    advise(first, (base + _NAME_BYTES * len(names) - first) // _PAGE * _PAGE, _POPULATE_WRITE)


@kernel
def _home(names: Names, engine_hash: np.uint64) -> int:
    room = np.uint64(len(names))
    return np.int64((((engine_hash * _GOLDEN) >> _32) * room) >> _32)  # type: ignore[return-value]


@kernel
def place_of(names: Names, engine_hash: np.uint64) -> int:
    """Where the name stands, or, if the table does not hold it, the free entry where it belongs."""
    at, room = _home(names, engine_hash), len(names)
    while names[at].next and names[at].hash != engine_hash:
        at = at + 1 if at + 1 < room else 0
    return at


@kernel
def find_name(names: Names, engine_hash: np.uint64) -> int:
    """Where the name stands, or NONE."""
    at = place_of(names, engine_hash)
    return at if names[at].next else NONE


@kernel
def expect_name(names: Names, engine_hash: np.uint64) -> None:
    """Begins to fetch what `find_name` will look at."""
    prefetch(names.ctypes.data + _NAME_BYTES * _home(names, engine_hash))


@kernel
def slot_at(names: Names, at: int) -> int:
    """The slot of the block whose name stands at `at`; NONE: none does."""
    return int(np.int64(names[at].next & _SLOT)) - 1


@kernel
def add_name(names: Names, at: int, engine_hash: np.uint64, slot: int) -> None:
    """Adds a name where it belongs, of a block in one copy; the table must not be full by it."""
    names[at].hash = engine_hash
    names[at].next = np.uint32(slot + 1)


@kernel
def add_copy(names: Names, at: int) -> bool:
    """One more copy of what is called so; False: no more can be counted."""
    counts = names[at].next >> np.uint32(SLOT_BITS) < MOST_COPIES
    if counts:
        names[at].next += _COPY
    return bool(counts)


@kernel
def drop_copy(names: Names, at: int) -> bool:
    """One copy fewer of what is called so; False: it is the last."""
    more = names[at].next >= _COPY
    if more:
        names[at].next -= _COPY
    return bool(more)


@kernel
def move_name(old: Names, at: int, new: Names) -> None:
    """Adds the name that stands at `at` to a table that does not hold it; there must be room."""
    place = place_of(new, old[at].hash)
    new[place].hash = old[at].hash
    new[place].next = old[at].next


@kernel
def delete_name(names: Names, at: int) -> None:
    """Drops the name that stands at `at` and closes the gap."""
    gap, room = at, len(names)
    while True:
        at = at + 1 if at + 1 < room else 0
        if not names[at].next:
            break
        home = _home(names, names[at].hash)
        from_home = at - home if at >= home else at - home + room
        from_gap = at - gap if at >= gap else at - gap + room
        if from_home >= from_gap:
            names[gap].hash = names[at].hash
            names[gap].next = names[at].next
            gap = at
    names[gap].next = 0


@kernel
def copy_names(old: Names, new: Names) -> None:
    """Fills an empty table with another's names."""
    for at in range(len(old)):
        if old[at].next:
            move_name(old, at, new)
