"""What one source holds at one moment, copied while events and lookups go on.

The cut itself copies the source's names, memory to memory (a millisecond for 600,000). What the names lead to is read
afterwards, a few thousand blocks under one hold of the writers' lock, which lookups do not take. A change that comes
between is kept out by its image before: of every name that an event is about to touch, the block is saved first, the
first time. What is evicted meanwhile is left out: the index may forget at any time. A source that is dropped meanwhile
has no copy.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cairn.fleet.blocks import Blocks
from cairn.fleet.fair import FairLock
from cairn.fleet.holders import Holders, Words, tiers_of
from cairn.fleet.names import Hashes, Names, SlotIds, find_name, slot_at
from cairn.index.slots import NONE
from cairn.jit import kernel
from cairn.kv import Keys

#: Blocks read under one hold of the lock, and blocks that are handed on together.
_HOLD, PIECE = 1 << 12, 1 << 16

Tiers = npt.NDArray[np.uint8]

_IMAGE = np.dtype([("key0", np.uint64), ("key1", np.uint64), ("tiers", np.uint8)])


class Piece(NamedTuple):
    """Blocks of a source [n], in the order of their records, so that chains that lay in a row will again: its names of
    them, their keys [n, 2], and bits of the tiers that it holds them in, never 0.
    """

    hashes: Hashes
    keys: Keys
    tiers: Tiers


class Kept(Protocol):
    """What a copy must know of a source (`ledger.Member`)."""

    number: int
    names: Names
    count: int
    sizes: tuple[int, ...]


class State(Protocol):
    """What a copy must know of the index (`ledger.Ledger`)."""

    writers: FairLock
    blocks: Blocks
    holders: Holders
    copies: "list[SourceCopy]"


@kernel
def _compact(names: Names, hashes: Hashes, slots: SlotIds) -> int:
    count = 0
    for at in range(len(names)):
        slot = slot_at(names, at)
        if slot != NONE:
            hashes[count] = names[at].hash
            slots[count] = slot
            count += 1
    return count


@kernel
def _save(
    blocks: Blocks,
    rows: Words,
    names: Names,
    hashes: Hashes,
    source: int,
    marks: SlotIds,
    images: npt.NDArray[np.void],
    count: int,
) -> int:
    """Saves what these names lead to, unless it is saved; returns how many images there are then."""
    for i in range(len(hashes)):
        at = find_name(names, hashes[i])
        if at == NONE or marks[slot_at(names, at)]:
            continue
        slot = slot_at(names, at)
        images[count].key0 = blocks.records[slot].key0
        images[count].key1 = blocks.records[slot].key1
        images[count].tiers = tiers_of(rows, blocks.records[slot].holders, source)
        count += 1
        marks[slot] = count
    return count


@kernel
def _read(
    blocks: Blocks,
    rows: Words,
    slots: SlotIds,
    source: int,
    marks: SlotIds,
    images: npt.NDArray[np.void],
    keys: Keys,
    tiers: Tiers,
) -> None:
    """keys[i] and tiers[i] of slots[i] at the moment of the cut; tiers 0: evicted since."""
    for i in range(len(slots)):
        slot = slots[i]
        mark = marks[slot]
        if mark < 0:
            tiers[i] = 0
        elif mark:
            keys[i, 0] = images[mark - 1].key0
            keys[i, 1] = images[mark - 1].key1
            tiers[i] = images[mark - 1].tiers
        else:
            keys[i, 0] = blocks.records[slot].key0
            keys[i, 1] = blocks.records[slot].key1
            tiers[i] = tiers_of(rows, blocks.records[slot].holders, source)


class SourceCopy:
    """A copy of one source, for one thread: made ahead, `cut` at the moment that counts, then read piece by piece.

    The first call takes the memory, 12 bytes for each entry of the source's table of names, so that the cut need not.
    To be closed: until then the index keeps images of what changes.
    """

    def __init__(self, state: State, member: Kept) -> None:
        self._state = state
        self._member = member
        self._names = np.empty_like(member.names)
        self._names.view(np.uint8).fill(0)  # the first touch of memory costs ten times what the copy does
        self._marks = np.empty(0, np.int32)
        self._images = np.empty(0, _IMAGE)
        self._saved = 0
        #: Names at the cut, and the block sizes that the source used.
        self.count = 0
        self.sizes: tuple[int, ...] = ()
        #: Whether the source was dropped since, so that the copy is none.
        self.broken = False

    def cut(self) -> None:
        """Takes the moment. Hold the writers' lock, and know that the source is there."""
        names = self._member.names
        if len(names) > len(self._names):
            self._names = np.empty(len(names), names.dtype)
        self._names = self._names[: len(names)]
        self._names.view(np.uint8)[:] = names.view(np.uint8)  # bytes: numpy copies records one by one
        self._marks = np.zeros(len(self._state.blocks.records), np.int32)  # touched as it is used
        self.count, self.sizes = self._member.count, self._member.sizes
        self._state.copies.append(self)

    def of(self, member: Kept) -> bool:
        """Whether this is a copy of that source."""
        return self._member is member

    def before(self, hashes: Hashes) -> None:
        """An event is about to touch what the source calls so. Hold the writers' lock."""
        if self._saved + len(hashes) > len(self._images):
            larger = np.empty(2 * (self._saved + len(hashes)), _IMAGE)
            larger[: self._saved] = self._images[: self._saved]
            self._images = larger
        blocks, rows, member = self._state.blocks, self._state.holders.rows, self._member
        self._saved = _save(blocks, rows, member.names, hashes, member.number, self._marks, self._images, self._saved)

    def evicted(self, slots: SlotIds) -> None:
        """These records are no more what they were. Hold the writers' lock."""
        self._marks[slots] = -1

    def pieces(self) -> Iterator[Piece]:
        """All blocks, up to PIECE at a time. Ends early if the source is dropped meanwhile (`broken`)."""
        hashes, slots = np.empty(self.count, np.uint64), np.empty(self.count, np.int32)
        _compact(self._names, hashes, slots)
        order = np.argsort(slots)
        slots, hashes = slots[order], hashes[order]
        for first in range(0, self.count, PIECE):
            part = slots[first : first + PIECE]
            keys, tiers = np.empty((len(part), 2), np.uint64), np.empty(len(part), np.uint8)
            for at in range(0, len(part), _HOLD):
                if not self._read(part[at : at + _HOLD], keys[at : at + _HOLD], tiers[at : at + _HOLD]):
                    return
            there = tiers != 0
            yield Piece(hashes[first : first + PIECE][there], keys[there], tiers[there])

    def close(self) -> None:
        """Repeatable."""
        with self._state.writers:
            self._state.copies[:] = [copy for copy in self._state.copies if copy is not self]

    def _read(self, slots: SlotIds, keys: Keys, tiers: Tiers) -> bool:
        state = self._state
        with state.writers:
            if not self.broken:
                number, rows = self._member.number, state.holders.rows
                _read(state.blocks, rows, slots, number, self._marks, self._images, keys, tiers)
            return not self.broken
