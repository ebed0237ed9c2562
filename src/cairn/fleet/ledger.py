"""Who holds what: the state of the index, its room, and what goes when there is none.

Two locks. Whoever changes anything holds `writers`, for as long as it likes; and `lock` besides while a reader could
see the change, for one batch at a time. So larger tables are built, names are moved and the dead are swept while
readers go on with what there is.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.base import Source, StoredMany
from cairn.fleet.blocks import (
    COPIED,
    Chain,
    attach,
    bury,
    kill,
    memory_of_blocks,
    new_blocks,
    remove,
    sweep,
    taken,
    with_table,
    withdraw,
)
from cairn.fleet.chains import follow
from cairn.fleet.copying import Piece, SourceCopy
from cairn.fleet.fair import FairLock
from cairn.fleet.holders import TIERS, memory_of_sets, new_holders, sets_left, widened
from cairn.fleet.names import FULL, Hashes, Names, copy_names, find_name, has_room, new_names, slot_at
from cairn.fleet.storing import BATCH, BLOCK, CURSOR_WORDS, restore, store, store_many
from cairn.index.slots import NONE
from cairn.kv import Keys
from cairn.kv.keys import Tokens

#: Blocks of events that come together, as long as nobody waits for the lock.
_TOGETHER = 4 * BATCH

#: Blocks whose keys are looked for under one hold of the lock, where hardly one has to be hashed.
_AT_ONCE = 1 << 13

_EXPECTED, _SETS, _ALIKE = 4096, 256, 1 << 16
_MOST_SIZES = 8


class Roster(NamedTuple):
    """All sources, and their numbers [n]."""

    sources: tuple[Source, ...]
    numbers: npt.NDArray[np.int32]


class Member:
    """What is known of one source: its number, its names and how many, the block sizes that it uses. held_back: not
    to be told of to readers yet.
    """

    __slots__ = ("count", "held_back", "names", "number", "sizes")

    def __init__(self, number: int, names: Names) -> None:
        self.number = number
        self.names = names
        self.count = 0
        self.sizes: tuple[int, ...] = ()
        self.held_back = False


class Ledger:
    """The state of a FleetIndex, which describes its parameters. Hold `writers` for every call, except of `roster`; for
    it, and for reading `blocks` and `holders`, hold `lock`.

    sizes: the block sizes in use; may be read by anybody.
    """

    def __init__(self, capacity: int, worker_blocks: int, sources: int) -> None:
        self.writers = FairLock()
        self.lock = FairLock()
        self._capacity = capacity
        self._worker_blocks = worker_blocks
        self._limit = sources
        self._batch, self._together = (
            max(1, min(most, capacity // 4, worker_blocks // 4)) for most in (BATCH, _TOGETHER)
        )
        self._expected = min(capacity, _EXPECTED)
        self.blocks = new_blocks(capacity, self._expected)
        self.holders = new_holders(_SETS + 2 * self._together, 1)
        self.members: dict[Source, Member] = {}
        self.copies: list[SourceCopy] = []
        self._spare: list[int] = []
        self._roster: Roster | None = None
        self._users: Counter[int] = Counter()
        self.sizes: tuple[int, ...] = ()
        self.named = 0
        self.evicted = 0
        self.uncounted = 0

    @property
    def limits(self) -> tuple[int, int]:
        """Blocks and worker-blocks at most."""
        return self._capacity, self._worker_blocks

    @property
    def words(self) -> int:
        """Words of 64 sources in a set."""
        return int(self.holders.rows.shape[1]) // TIERS

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        names = sum(member.names.nbytes for member in self.members.values())
        return memory_of_blocks(self.blocks) + memory_of_sets(self.holders) + names

    def follow(self, chain: Chain, rows: Tokens, first: int, seed: Keys, most: int) -> int:
        """Fills a chain of blocks [n, tokens] from `first` on, behind the key `seed` [1, 2], until `most` are hashed;
        returns where it ends. Takes `lock` for each part.
        """
        while first < len(rows) and most > 0:
            part = slice(first, first + _AT_ONCE)
            with self.lock:
                rest = Chain(chain.keys[part], chain.links[part])
                count, hashed = follow(self.blocks, seed, NONE, rows[part], rest, min(most, BATCH))
            first, most = first + count, most - hashed
            seed = chain.keys[first - 1 : first]
        return first

    def key_of(self, source: Source, engine_hash: np.uint64) -> bytes | None:
        """The key of what the source calls so, 16 bytes."""
        member = self.members.get(source)
        at = find_name(member.names, engine_hash) if member else NONE
        if member is None or at == NONE:
            return None
        record = self.blocks.records[slot_at(member.names, at)]
        return bytes(record["key0"].tobytes() + record["key1"].tobytes())

    def store(
        self, source: Source, block_tokens: int, chain: Chain, hashes: Hashes, tier: int, *, copies: bool
    ) -> int | None:
        """The source holds these blocks; returns how many it holds under another name, None if it is not taken in.
        copies: those that it holds already under this name are further copies, if `tier` is one that has copies.
        """
        member = self._member(source, block_tokens)
        if member is None:
            return None
        doubles = 0
        for part in self._batches(len(hashes)):
            count = len(hashes[part])
            self._make_room(count)
            self._room_for_names(member, count)
            self._before(member, hashes[part])
            with self.lock:
                added, refused, uncounted, _ = store(
                    self.blocks,
                    self.holders,
                    member.names,
                    Chain(chain.keys[part], chain.links[part]),
                    hashes[part],
                    member.number,
                    tier,
                    0 if copies and 1 << tier == COPIED else count,
                    False,
                    True,
                )
            self._count(member, added)
            doubles += refused
            self.uncounted += uncounted
        return doubles

    def uses(self, source: Source, block_tokens: int) -> bool:
        """Whether the source has stored blocks of that size."""
        member = self.members.get(source)
        return member is not None and block_tokens in member.sizes

    def store_many(self, source: Source, many: StoredMany, root: Keys) -> tuple[int, int]:
        """As `store` for each event, ; the source must use their size.

        Returns how many blocks had an unknown parent, and how many the source holds under another name.
        """
        member, cursor = self.members[source], np.zeros(CURSOR_WORDS, np.uint64)
        orphans, doubles = 0, 0
        while cursor[BLOCK] < len(many.hashes):
            count = min(self._together, len(many.hashes) - int(cursor[BLOCK]))
            self._make_room(count)
            self._room_for_names(member, count)
            self._before(member, many.hashes[int(cursor[BLOCK]) :][:count])
            with self.lock:
                added, refused, uncounted, strange = store_many(
                    self.blocks,
                    self.holders,
                    member.names,
                    root,
                    many.tokens,
                    many.hashes,
                    many.told,
                    cursor,
                    count,
                    member.number,
                    int(many.tier),
                    many.copies and 1 << many.tier == COPIED,
                    self.lock.waiting,
                )
            self._count(member, added)
            orphans += strange
            doubles += refused
            self.uncounted += uncounted
        return orphans, doubles

    def attach(self, source: Source, hashes: Hashes, tier: int) -> int:
        """The source holds these blocks in one more tier; returns how many it never named."""
        member, unknown = self.members.get(source), 0
        if member is None:
            return len(hashes)
        for part in self._batches(len(hashes)):
            self._room_for_sets()
            self._before(member, hashes[part])
            with self.lock:
                unknown += attach(self.blocks, self.holders, member.names, hashes[part], member.number, tier)
        return unknown

    def remove(self, source: Source, hashes: Hashes, tiers: int) -> int:
        """The source holds these blocks in these tiers (bits) no more; returns how many it did not hold there."""
        member, unknown = self.members.get(source), 0
        if member is None:
            return len(hashes)
        for part in self._batches(len(hashes)):
            self._room_for_sets()
            self._before(member, hashes[part])
            with self.lock:
                gone, strange = remove(self.blocks, self.holders, member.names, hashes[part], member.number, tiers)
            self._count(member, -gone)
            unknown += strange
        return unknown

    def drop(self, source: Source) -> None:
        """The source is gone, and so is its number once nothing bears it any more."""
        member = self.members.get(source)
        if member is None:
            return
        for copy in self.copies:
            copy.broken |= copy.of(member)
        for part in self._batches(len(member.names)):
            self._room_for_sets()
            with self.lock:
                withdraw(self.blocks, self.holders, member.names[part], member.number)
        self._count(member, -member.count)
        with self.lock:
            del self.members[source]
            self._roster = None
        self._spare.append(member.number)
        self._use(member.sizes, -1)

    def restore(self, source: Source, sizes: tuple[int, ...], names: int, *, held_back: bool) -> bool:
        """Makes a source that is not there yet, with room for so many names; False if there are too many sources or
        block sizes. held_back: readers are not told of it until `show`.
        """
        if source in self.members or len(self.members) == self._limit:
            return False
        if not sizes or len({*self.sizes, *sizes}) > _MOST_SIZES:
            return False
        member = self._admit(source, min(names, self._worker_blocks), held_back=held_back)
        member.sizes = sizes
        self._use(sizes, 1)
        return True

    def fill(self, source: Source, piece: Piece) -> None:
        """Stores what a copy has, for a source that is there."""
        member = self.members.get(source)
        for part in self._batches(len(piece.hashes), max(1, self._batch // 2)) if member else ():
            assert member is not None
            hashes, keys, tiers = piece.hashes[part], piece.keys[part], piece.tiers[part]
            self._make_room(len(hashes))
            self._room_for_names(member, len(hashes))
            self._before(member, hashes)
            with self.lock:
                added = restore(self.blocks, self.holders, member.names, keys, hashes, tiers, member.number)
            self._count(member, added)

    def show(self, source: Source) -> None:
        """Readers are told of the source from now on."""
        member = self.members.get(source)
        if member is not None and member.held_back:
            with self.lock:
                member.held_back = False
                self._roster = None

    def roster(self) -> Roster:
        """Who is there."""
        if self._roster is None:
            shown = {source: member.number for source, member in self.members.items() if not member.held_back}
            self._roster = Roster(tuple(shown), np.array(list(shown.values()), np.int32))
        return self._roster

    def _before(self, member: Member, hashes: Hashes) -> None:
        """Whoever copies the source wants to see what these names mean now."""
        for copy in self.copies:
            if copy.of(member):
                copy.before(hashes)

    def _batches(self, count: int, batch: int = 0) -> Iterator[slice]:
        batch = batch or self._batch
        return (slice(first, first + batch) for first in range(0, count, batch))

    def _count(self, member: Member, names: int) -> None:
        member.count += names
        self.named += names

    def _member(self, source: Source, block_tokens: int) -> Member | None:
        """The source's entry, which may be new; None if there are too many sources or block sizes."""
        member = self.members.get(source)
        if member is not None and block_tokens in member.sizes:
            return member
        if block_tokens not in self.sizes and len(self.sizes) == _MOST_SIZES:
            return None
        if member is None:
            if len(self.members) == self._limit:
                return None
            # Instances of one fleet are alike: room for as many names as the others have spares most of the moving.
            member = self._admit(source, min(_ALIKE, self.named // max(1, len(self.members))))
        member.sizes += (block_tokens,)
        self._use((block_tokens,), 1)
        return member

    def _admit(self, source: Source, names: int, *, held_back: bool = False) -> Member:
        number = self._spare.pop() if self._spare else len(self.members)
        if number >= 64 * self.words:
            self._rebuild_sets(len(self.holders.sets), 2 * self.words)
        member = Member(number, new_names(names, FULL))
        member.held_back = held_back
        with self.lock:
            self.members[source] = member
            self._roster = None
        return member

    def _use(self, sizes: tuple[int, ...], more: int) -> None:
        for size in sizes:
            self._users[size] += more
        self.sizes = tuple(sorted(size for size, users in self._users.items() if users))

    def _make_room(self, count: int) -> None:
        """For `count` more blocks, of which each may take a name and two sets."""
        self._room_for_sets()
        while taken(self.blocks) + count > self._capacity or self.named + count > self._worker_blocks:
            self._evict(max(count, taken(self.blocks) // 16))
        if taken(self.blocks) + count > self._expected:
            self._expected = min(self._capacity, 2 * self._expected)
            larger = with_table(self.blocks, self._expected)
            with self.lock:
                self.blocks = larger

    def _room_for_sets(self) -> None:
        if sets_left(self.holders) <= 2 * self._together:
            self._rebuild_sets(2 * len(self.holders.sets), self.words)

    @staticmethod
    def _room_for_names(member: Member, count: int) -> None:
        if not has_room(member.names, member.count + count):
            larger = new_names(member.count + count)
            copy_names(member.names, larger)
            member.names = larger

    def _rebuild_sets(self, room: int, words: int) -> None:
        larger = widened(self.holders, room, words)
        with self.lock:
            self.holders = larger

    def _evict(self, want: int) -> None:
        """The oldest blocks go, and then the names that led to them."""
        victims, count = np.empty(want, np.int32), 0
        bits = np.zeros(self.words, np.uint64)
        while count < want:
            with self.lock:
                killed = kill(self.blocks, self.holders, victims[count : count + self._batch], bits)
            if not killed:
                break
            count += killed
        for member in self.members.values():
            if bits[member.number >> 6] >> np.uint64(member.number & 63) & np.uint64(1):
                kept = new_names(member.count)
                left = sweep(self.blocks, member.names, kept)
                member.names = kept
                self._count(member, left - member.count)
        for copy in self.copies:
            copy.evicted(victims[:count])
        bury(self.blocks, victims[:count])
        self.evicted += count
