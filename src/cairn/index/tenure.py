"""Tenure: a block keeps its place for as long as it earns it. Cairn's own policy, and its default.

LRU keeps everything for the same time, which in a small cache is too short for any conversation to come back. Tenure
keeps some long enough and drops the others at once. It learns while it runs how soon blocks are used again
(`cairn.index.reuse`) and evicts the block whose place is worth least: expected hits per unit of the time that it will
stay.

Classes come from the prefix tree and the request pattern, and are scale-free:

- a block used once: by what it hangs from (nothing, a block new as well, a block used twice, ... a system prompt used
  by everybody), by whether it came with a few new blocks (the next turn of a chat) or many (a new document), and
  whether it was the last one of its request (which often is the ragged end that no later request repeats);
- a block used again: by how often, and by the mean time between its uses.

History outlives eviction as ghosts, so a conversation that comes back too late is known when it comes back again. Until
something has been learned, Tenure is LRU.
"""

import math

import numpy as np
import numpy.typing as npt

from cairn.index.base import EvictionPolicy
from cairn.index.ghosts import Ghosts, add_ghost, drop_ghost, find_ghost, new_ghosts
from cairn.index.leaves import Count, add_leaf, cut_leaves, drop_leaf, grow_leaves
from cairn.index.reuse import (
    AGES,
    PERIOD,
    ROOM,
    Rows,
    Samples,
    age_bucket,
    begin_sample,
    bucket_widths,
    count_samples,
    end_sample,
    exposure,
    new_samples,
    shrink,
    worth_by_age,
)
from cairn.index.slots import NONE, RESIDENT, SlotIds, Slots, evictable, unlink
from cairn.index.table import Table, new_table
from cairn.jit import kernel

LEVELS = 8  # of use counts: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16 and more
PACES = 8  # of mean gaps, in octaves of the capacity
FEW = 4  # new blocks that a chat's next turn brings at most
FRESH = (LEVELS + 1) * 4
KINDS = FRESH + (LEVELS - 1) * PACES
OPEN = 0x80  # in a slot's mark: its request is still under way, its kind provisional

STATE = np.dtype(
    [
        ("clock", np.float64),  # block uses so far
        ("start", np.float64),  # of the request under way, on the same clock
        ("unit", np.float64),  # capacity in blocks
        ("tail", np.int64),  # the last slot that the request under way has used
        ("origin", np.int64),  # level of the block that its new blocks hang from, plus one
        ("open", np.int64),  # how many new blocks it has brought
        ("sampled", np.int64),
        ("learned", np.int64),  # how many samples the worths were learned from
        ("seed", np.uint64),
        ("sparse", np.uint64),  # keys with key1 & sparse == 0 leave ghosts
    ],
    align=True,
)
State = npt.NDArray[np.void]
Worth = npt.NDArray[np.float32]

SCAN, DRAW, POOL = 64, 16, 24
"""Up to SCAN leaves are all weighed; of more, DRAW random ones and the POOL best that earlier draws have left."""


@kernel
def _level(uses: int) -> int:
    if uses < 4:
        return uses - 1
    return min(LEVELS - 1, int(2 * math.log2(uses)) - 1)


@kernel
def _fresh_kind(origin: int, brought: int, last: bool) -> int:
    return origin * 4 + (2 if brought >= FEW else 0) + (1 if last else 0)


@kernel
def _used_kind(uses: int, gap: float, unit: float) -> int:
    pace = min(PACES - 1, max(0, int(math.log2((gap + 1) / unit) + 2)))
    return FRESH + (_level(uses) - 1) * PACES + pace


@kernel
def _random(state: State, below: int) -> int:
    # xorshift64: reproducible, and good enough to draw candidates.
    x = state[0].seed
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0].seed = x
    return int((x >> np.uint64(11)) % np.uint64(below))


@kernel
def _sample(slots: Slots, state: State, samples: Samples, waiting: Table, slot: int, kind: int) -> None:
    if _random(state, PERIOD) == 0:
        at = state[0].sampled % ROOM
        begin_sample(samples, waiting, at, slots[slot].key0, slots[slot].key1, kind, slots[slot].stamp)
        state[0].sampled += 1


@kernel
def _close(slots: Slots, state: State, samples: Samples, waiting: Table, fresh: SlotIds) -> None:
    """The request under way is over: now it is known what its new blocks are."""
    many = state[0].open
    for i in range(min(many, len(fresh))):
        slot = fresh[i]
        if slots[slot].state == RESIDENT and slots[slot].mark & OPEN:
            slots[slot].mark = _fresh_kind(state[0].origin, many, slot == state[0].tail)
            _sample(slots, state, samples, waiting, slot, slots[slot].mark)
    state[0].open = 0
    state[0].start = state[0].clock


@kernel
def _use_again(slots: Slots, state: State, samples: Samples, waiting: Table, slot: int, gap: float) -> None:
    """Counts one more use of a block whose `uses` and mean gap (`born`) stand."""
    uses = min(255, slots[slot].uses + 1)
    slots[slot].uses = uses
    slots[slot].born += (gap - slots[slot].born) / min(uses - 1, 16)
    slots[slot].stamp = state[0].start
    slots[slot].mark = _used_kind(uses, slots[slot].born, state[0].unit)
    _sample(slots, state, samples, waiting, slot, slots[slot].mark)


@kernel
def _access(slots: Slots, state: State, samples: Samples, waiting: Table, fresh: SlotIds, ids: SlotIds) -> None:
    last = ids[len(ids) - 1]
    if last == state[0].tail:
        return  # the same request again, and nobody between: no new evidence
    _close(slots, state, samples, waiting, fresh)
    state[0].origin = _level(slots[last].uses) + 1
    for i in range(len(ids)):
        slot = ids[i]
        end_sample(samples, waiting, slots[slot].key0, slots[slot].key1, state[0].start)
        _use_again(slots, state, samples, waiting, slot, state[0].start - slots[slot].stamp)
    state[0].clock += len(ids)
    state[0].tail = last


@kernel
def _recall(
    slots: Slots, state: State, samples: Samples, waiting: Table, ghosts: Ghosts, slot: int, history: Rows
) -> bool:
    """Looks for the ghost of a block that has just become resident; `history` is [uses, gap, time] of the last one
    found."""
    key0, key1 = slots[slot].key0, slots[slot].key1
    end_sample(samples, waiting, key0, key1, state[0].start)
    if key1 & state[0].sparse == 0:
        at = find_ghost(ghosts, key0, key1)
        if at >= 0:
            history[0, 0] = ghosts[at].uses
            history[0, 1] = ghosts[at].gap
            history[0, 2] = ghosts[at].time
            drop_ghost(ghosts, at)
            return True
    return False


@kernel
def _insert(
    slots: Slots, state: State, samples: Samples, waiting: Table, ghosts: Ghosts, fresh: SlotIds, ids: SlotIds
) -> None:
    parent = slots[ids[0]].parent
    if parent == NONE or parent != state[0].tail:
        _close(slots, state, samples, waiting, fresh)
        state[0].origin = 0 if parent == NONE else _level(slots[parent].uses) + 1
    history = np.zeros((1, 3))
    known = 0
    for i in range(len(ids) - 1, -1, -1):
        slot = ids[i]
        found = _recall(slots, state, samples, waiting, ghosts, slot, history)
        if found and known == 0:
            known = i + 1
        slots[slot].stamp = state[0].start
        if known:
            # Where ghosts are sparse: what comes before a block that was seen was seen as well.
            slots[slot].uses = int(history[0, 0])
            slots[slot].born = history[0, 1]
            _use_again(slots, state, samples, waiting, slot, state[0].start - history[0, 2])
    if known:
        state[0].origin = _level(slots[ids[known - 1]].uses) + 1
    for i in range(known, len(ids)):
        slot = ids[i]
        slots[slot].uses = 1
        slots[slot].born = 0
        if state[0].open < len(fresh):
            fresh[state[0].open] = slot
        state[0].open += 1
        slots[slot].mark = OPEN | _fresh_kind(state[0].origin, state[0].open, False)
    state[0].clock += len(ids)
    state[0].tail = ids[len(ids) - 1]


@kernel
def _worth_of(slots: Slots, state: State, worth: Worth, slot: int) -> float:
    """Higher: keep. Ties within an age bucket go to the younger."""
    age = state[0].clock - slots[slot].stamp
    kind = slots[slot].mark & (OPEN - 1)
    return float(worth[kind, age_bucket(age, state[0].unit)])


@kernel
def _better(slots: Slots, state: State, worth: Worth, slot: int, best: int, least: float) -> float:
    """The slot's worth if it should go before `best`, else -1."""
    if not evictable(slots, slot):
        return -1.0
    value = _worth_of(slots, state, worth, slot)
    if best == NONE or value < least or (value == least and slots[slot].stamp < slots[best].stamp):
        return value
    return -1.0


@kernel
def _choose(slots: Slots, state: State, worth: Worth, leaves: SlotIds, count: Count, pool: SlotIds) -> int:
    """The leaf to go next, or NONE if all are in use."""
    best, least = NONE, 0.0
    if count[0] <= SCAN:
        for i in range(count[0]):
            value = _better(slots, state, worth, leaves[i], best, least)
            if value >= 0.0:
                best, least = leaves[i], value
        return int(best)
    # The pool keeps the least worthy of all draws so far, in order; a draw replaces what is worthier than it.
    drawn = np.empty(POOL + DRAW, np.int32)
    values = np.empty(POOL + DRAW, np.float64)
    n = 0
    for i in range(POOL + DRAW):
        slot = pool[i] if i < POOL else leaves[_random(state, count[0])]
        if slot == NONE or slots[slot].queue == 0 or not evictable(slots, slot):
            continue
        value = _worth_of(slots, state, worth, slot)
        at = n
        twice = False
        while at > 0 and (
            values[at - 1] > value or (values[at - 1] == value and slots[drawn[at - 1]].stamp > slots[slot].stamp)
        ):
            at -= 1
        for j in range(n):
            if drawn[j] == slot:
                twice = True
        if twice:
            continue
        for j in range(n, at, -1):
            drawn[j] = drawn[j - 1]
            values[j] = values[j - 1]
        drawn[at] = slot
        values[at] = value
        n += 1
    for i in range(POOL):
        pool[i] = drawn[i + 1] if i + 1 < n else NONE
    if n > 0:
        return int(drawn[0])
    first = _random(state, count[0])
    for i in range(count[0]):
        slot = leaves[(first + i) % count[0]]
        if evictable(slots, slot):
            return int(slot)
    return NONE


@kernel
def _evict(
    slots: Slots,
    state: State,
    worth: Worth,
    samples: Samples,
    waiting: Table,
    ghosts: Ghosts,
    leaves: SlotIds,
    count: Count,
    pool: SlotIds,
    victims: SlotIds,
) -> int:
    found = 0
    slot = NONE
    while found < len(victims):
        if slot == NONE:
            slot = _choose(slots, state, worth, leaves, count, pool)
            if slot == NONE:
                break
        if slots[slot].mark & OPEN:
            slots[slot].mark &= OPEN - 1
            _sample(slots, state, samples, waiting, slot, slots[slot].mark)
        key0, key1 = slots[slot].key0, slots[slot].key1
        if key1 & state[0].sparse == 0:
            add_ghost(ghosts, key0, key1, slots[slot].stamp, slots[slot].born, slots[slot].uses)
        if slot == state[0].tail:
            state[0].tail = NONE
        parent = slots[slot].parent
        drop_leaf(slots, leaves, count, slot)
        unlink(slots, slot)
        victims[found] = slot
        found += 1
        same = NONE
        if parent != NONE and slots[parent].child == NONE:
            add_leaf(slots, leaves, count, parent)
            # A request's blocks of one kind are worth the same: the run goes on without a new choice.
            alike = slots[parent].mark == slots[slot].mark and slots[parent].stamp == slots[slot].stamp
            if alike and evictable(slots, parent):
                same = parent
        slot = same
    return found


@kernel
def _learn(samples: Samples, widths: npt.NDArray[np.float64], clock: float, unit: float, worth: Worth) -> None:
    """Turns the samples into the worth of each kind at each age."""
    hits = np.zeros((KINDS, AGES))
    exits = np.zeros((KINDS, AGES))
    time = np.zeros((KINDS, AGES))
    count_samples(samples, clock, unit, hits, exits)
    exposure(exits, widths, time)
    level_hits = np.zeros((LEVELS, AGES))
    level_time = np.zeros((LEVELS, AGES))
    for kind in range(KINDS):
        level = 0 if kind < FRESH else 1 + (kind - FRESH) // PACES
        level_hits[level] += hits[kind]
        level_time[level] += time[kind]
    common = np.empty(AGES)
    flat = np.full(AGES, 1e-9)
    shrink(level_hits.sum(axis=0), level_time.sum(axis=0), widths, flat, BORROW_LEVEL, common)
    of_level = np.empty((LEVELS, AGES))
    for level in range(LEVELS):
        shrink(level_hits[level], level_time[level], widths, common, BORROW_LEVEL, of_level[level])
    own = np.empty(AGES)
    row = np.empty(AGES)
    for kind in range(KINDS):
        level = 0 if kind < FRESH else 1 + (kind - FRESH) // PACES
        shrink(hits[kind], time[kind], widths, of_level[level], BORROW_KIND, own)
        worth_by_age(own, widths, row)
        for age in range(AGES):
            worth[kind, age] = row[age]


BORROW_LEVEL, BORROW_KIND = 3.0, 60.0
"""How many samples of the group's pattern a group or a class is given in advance."""


class Tenure(EvictionPolicy):
    """See the module. `now` is not used: the clock is the number of block uses."""

    name = "tenure"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        capacity = len(slots)
        self._state: State = np.zeros(1, STATE)
        self._state["unit"] = capacity
        self._state["tail"] = NONE
        self._state["seed"] = 0x9E3779B97F4A7C15
        self._leaves: SlotIds = np.empty(capacity, np.int32)
        self._count: Count = np.zeros(1, np.int64)
        self._pool: SlotIds = np.full(POOL, NONE, np.int32)
        self._fresh: SlotIds = np.empty(max(1, min(capacity, 4096)), np.int32)
        self._ghosts = new_ghosts(max(1 << 16, capacity // 2))
        reach = 6 * capacity / len(self._ghosts)
        self._state["sparse"] = (1 << max(0, math.ceil(math.log2(reach)))) - 1
        self._samples = new_samples()
        self._waiting: Table = new_table(ROOM)
        self._widths = bucket_widths(float(capacity))
        # Nothing is known yet: the older, the less worth, which is LRU.
        ages = np.arange(AGES, dtype=np.float32)
        self._worth: Worth = np.tile(1 / (1 + ages), (KINDS, 1)).astype(np.float32)

    def insert(self, ids: SlotIds, now: float) -> None:
        if len(ids):
            _insert(self.slots, self._state, self._samples, self._waiting, self._ghosts, self._fresh, ids)
            grow_leaves(self.slots, self._leaves, self._count, ids)

    def access(self, ids: SlotIds, now: float) -> None:
        if len(ids):
            _access(self.slots, self._state, self._samples, self._waiting, self._fresh, ids)

    def remove(self, ids: SlotIds) -> None:
        cut_leaves(self.slots, self._leaves, self._count, ids)

    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        self._relearn()
        victims = np.empty(want, np.int32)
        found = _evict(
            self.slots,
            self._state,
            self._worth,
            self._samples,
            self._waiting,
            self._ghosts,
            self._leaves,
            self._count,
            self._pool,
            victims,
        )
        return victims[:found]

    def _relearn(self) -> None:
        state = self._state[0]
        if state["sampled"] - state["learned"] >= max(64, min(512, int(state["learned"]) // 2)):
            state["learned"] = state["sampled"]
            _learn(self._samples, self._widths, float(state["clock"]), float(state["unit"]), self._worth)
