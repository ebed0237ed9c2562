"""Tenure: a block keeps its place for as long as it earns it. Cairn's own policy, and its default.

LRU keeps everything for the same time, which in a small cache is too short for any conversation to come back. Tenure
keeps some long enough and drops the others at once. It knows the kinds of blocks (`cairn.index.kinds`), learns while it
runs when each kind is asked for again (`cairn.index.reuse`), and evicts the block whose place is worth least: expected
hits per unit of the time that it would stay.

It keeps a score against LRU, whose hits can be told from the times between uses alone. Until something has been
learned it is LRU, and when it falls behind, because the pattern has changed, it forgets everything and is LRU again for
a while.

History outlives eviction as ghosts, and what a request asked for counts even where it was not stored, so a conversation
that comes back too late is known when it comes back again. Uses of a block in quick succession count once: an engine
may touch a request's blocks several times (correlated references: O'Neil et al., LRU-K, SIGMOD'93).
"""

import math

import numpy as np
import numpy.typing as npt

from cairn.index.base import EvictionPolicy
from cairn.index.ghosts import Ghosts, add_ghost, drop_ghost, find_ghost, new_ghosts
from cairn.index.kinds import KINDS, fresh_kind, level_of, share_of, used_kind
from cairn.index.leaves import Count, Pool, add_leaf, choose_leaf, cut_leaves, drop_leaf, grow_leaves, new_pool
from cairn.index.reuse import (
    AGES,
    ROOM,
    Samples,
    Worth,
    begin_sample,
    bucket_widths,
    end_sample,
    learn,
    new_samples,
)
from cairn.index.rng import SEED, random_below
from cairn.index.slots import NONE, Keys, SlotIds, Slots, evictable, unlink
from cairn.index.table import Table, new_table
from cairn.jit import kernel

PATIENCE = 64
"""Uses of a block count once while others use less than a 64th part of the capacity."""

START = 2
"""Until so many blocks have been asked for per block of capacity, too little is known of long times: Tenure is LRU."""

MEMORY, DOUBT = 512, 3.0
"""The score against LRU spans about so many requests; behind by so many standard deviations, Tenure starts over."""

SPAN = 8
"""The samples in memory should reach back over so many block uses per block of capacity."""

LEAST_GHOSTS = 1 << 16
"""There are as many ghosts as blocks, but at least so many: a small cache has the more to remember."""

STATE = np.dtype(
    [
        ("clock", np.float64),  # block uses so far
        ("unit", np.float64),  # capacity in blocks
        ("lru_reach", np.float64),  # how long LRU would keep a block, on the clock
        ("lead", np.float64),  # hits more than LRU's, summed over the last requests, ...
        ("spread", np.float64),  # ... and the sum of their squares
        ("resume", np.float64),  # until then, on the clock, it is LRU
        ("trial", np.float64),  # and will be so long after the next failure, in capacities
        ("period", np.int64),  # one run of blocks in so many is sampled
        ("sampled", np.int64),
        ("learned", np.int64),  # how many samples the worths were last learned from
        ("seed", np.uint64),
    ],
    align=True,
)
State = npt.NDArray[np.void]
Kinds = npt.NDArray[np.int16]
UNCOUNTED = -1


@kernel
def _sample_runs(state: State, samples: Samples, waiting: Table, keys: Keys, kinds: Kinds) -> None:
    """Samples one block of each run of equal kinds, or of every n-th run."""
    first = 0
    for i in range(1, len(keys) + 1):
        if i < len(keys) and kinds[i] == kinds[first]:
            continue
        if kinds[first] != UNCOUNTED and random_below(state, state[0].period) == 0:
            pick = first + random_below(state, i - first)
            at = state[0].sampled % ROOM
            weight = math.sqrt(i - first) * state[0].period
            begin_sample(samples, waiting, at, keys[pick, 0], keys[pick, 1], kinds[first], weight, state[0].clock)
            state[0].sampled += 1
        first = i


@kernel
def _mean(gap: float, new: float, uses: int) -> float:
    return gap + (new - gap) / min(uses - 1, 16)


@kernel
def _keep_score(state: State, lead: int) -> None:
    """Sums up leads over LRU, the older the less."""
    if state[0].learned > 0:
        state[0].lead += lead - state[0].lead / MEMORY
        state[0].spread += lead * lead - state[0].spread / MEMORY


@kernel
def _access(
    slots: Slots, state: State, samples: Samples, waiting: Table, ghosts: Ghosts, keys: Keys, ids: SlotIds
) -> None:
    clock, unit = state[0].clock, state[0].unit
    resident, length = len(ids), len(keys)
    seen = length
    while seen > resident and find_ghost(ghosts, keys[seen - 1, 0], keys[seen - 1, 1]) < 0:
        seen -= 1
    share = share_of(length - seen, length)
    # The clock has moved on by this very request if it comes again.
    patience = length + unit / PATIENCE
    counted = 0
    kinds = np.full(length, UNCOUNTED, np.int16)
    origin = 0
    lead = 0
    lru_hits = True
    for i in range(length):
        at = find_ghost(ghosts, keys[i, 0], keys[i, 1]) if resident <= i < seen else -1
        since = math.inf
        if i < resident or at >= 0:
            since = clock - (slots[ids[i]].stamp if i < resident else ghosts[at].time)
        lru_hits = lru_hits and since < state[0].lru_reach
        if since > patience:
            lead += (1 if i < resident else 0) - (1 if lru_hits else 0)
        if i < resident:
            slot = ids[i]
            gap = clock - slots[slot].stamp
            if gap > patience:
                uses = min(255, slots[slot].uses + 1)
                slots[slot].uses = uses
                slots[slot].born = _mean(slots[slot].born, gap, uses)
                slots[slot].stamp = clock
                slots[slot].mark = used_kind(uses, slots[slot].born, share, unit)
                kinds[i] = slots[slot].mark
            origin = 1 + level_of(slots[slot].uses)
        elif at >= 0:
            gap = clock - ghosts[at].time
            if gap > patience:
                uses = min(255, ghosts[at].uses + 1)
                ghosts[at].uses = uses
                ghosts[at].gap = _mean(ghosts[at].gap, gap, uses)
                ghosts[at].time = clock
                ghosts[at].kind = used_kind(uses, ghosts[at].gap, share, unit)
                kinds[i] = ghosts[at].kind
            origin = 1 + level_of(ghosts[at].uses)
        else:
            kinds[i] = fresh_kind(origin, share, i == length - 1)
            add_ghost(ghosts, keys[i, 0], keys[i, 1], clock, 0.0, 1, kinds[i])
        if kinds[i] != UNCOUNTED:
            end_sample(samples, waiting, keys[i, 0], keys[i, 1], clock)
            counted += 1
    _sample_runs(state, samples, waiting, keys, kinds)
    _keep_score(state, lead)
    state[0].clock += counted


@kernel
def _insert(slots: Slots, state: State, ghosts: Ghosts, ids: SlotIds) -> None:
    """New blocks take over what their ghosts know."""
    for i in range(len(ids)):
        slot = ids[i]
        at = find_ghost(ghosts, slots[slot].key0, slots[slot].key1)
        if at >= 0:
            slots[slot].uses = ghosts[at].uses
            slots[slot].born = ghosts[at].gap
            slots[slot].stamp = ghosts[at].time
            slots[slot].mark = ghosts[at].kind
            drop_ghost(ghosts, at)
        else:
            # Nobody has asked for it: the engine stores what it has generated, or an index is restored.
            parent = slots[slot].parent
            slots[slot].uses = 1
            slots[slot].born = 0
            slots[slot].stamp = state[0].clock
            slots[slot].mark = fresh_kind(0 if parent == NONE else 1 + level_of(slots[parent].uses), 0, False)


_WAIT, _LEARN, _START_OVER = 0, 1, 2


@kernel
def _due(state: State) -> int:
    """Whether it is time to learn again, or to start over, as LRU did better."""
    doubt = DOUBT * math.sqrt(state[0].spread)
    if state[0].lead < -doubt:
        return _START_OVER
    if state[0].lead > doubt:
        state[0].trial = START
    enough = state[0].sampled - state[0].learned >= max(64, min(ROOM // 16, state[0].learned // 2))
    return _LEARN if enough and state[0].clock >= state[0].resume else _WAIT


@kernel
def _evict(
    slots: Slots,
    state: State,
    worth: Worth,
    ghosts: Ghosts,
    leaves: SlotIds,
    count: Count,
    pool: Pool,
    victims: SlotIds,
) -> int:
    found = 0
    slot = NONE
    while found < len(victims):
        if slot == NONE:
            slot = choose_leaf(slots, leaves, count, pool, worth, state[0].clock, state[0].unit)
            if slot == NONE:
                break
        key0, key1 = slots[slot].key0, slots[slot].key1
        add_ghost(ghosts, key0, key1, slots[slot].stamp, slots[slot].born, slots[slot].uses, slots[slot].mark)
        parent = slots[slot].parent
        drop_leaf(slots, leaves, count, slot)
        unlink(slots, slot)
        victims[found] = slot
        found += 1
        following = NONE
        if parent != NONE and slots[parent].child == NONE:
            add_leaf(slots, leaves, count, parent)
            # Blocks of one request and kind are worth the same, so their run goes on without a new choice.
            alike = slots[parent].mark == slots[slot].mark and slots[parent].stamp == slots[slot].stamp
            if alike and evictable(slots, parent):
                following = parent
        slot = following
    return found


class Tenure(EvictionPolicy):
    """See the module. `now` is not used: time is counted in blocks asked for."""

    name = "tenure"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        capacity = len(slots)
        self._ghosts = new_ghosts(max(LEAST_GHOSTS, capacity))
        self._state: State = np.zeros(1, STATE)
        self._state["unit"] = capacity
        self._state["period"] = 1
        self._state["seed"] = SEED
        self._leaves: SlotIds = np.empty(capacity, np.int32)
        self._count: Count = np.zeros(1, np.int64)
        self._pool = new_pool()
        self._samples = new_samples()
        self._waiting: Table = new_table(ROOM)
        self._widths = bucket_widths(float(capacity))
        self._worth: Worth = np.empty((KINDS, AGES), np.float32)
        self._state["trial"] = START
        self._start_over()

    def insert(self, ids: SlotIds, now: float) -> None:
        if len(ids):
            _insert(self.slots, self._state, self._ghosts, ids)
            grow_leaves(self.slots, self._leaves, self._count, ids)

    def access(self, keys: Keys, ids: SlotIds, now: float) -> None:
        if len(keys):
            _access(self.slots, self._state, self._samples, self._waiting, self._ghosts, keys, ids)

    def remove(self, ids: SlotIds) -> None:
        cut_leaves(self.slots, self._leaves, self._count, ids)

    def evict(self, want: int, pinned: int, now: float) -> SlotIds:
        self._relearn()
        victims = np.empty(want, np.int32)
        found = _evict(
            self.slots, self._state, self._worth, self._ghosts, self._leaves, self._count, self._pool, victims
        )
        return victims[:found]

    def _relearn(self) -> None:
        """Learns again when enough was sampled since; spreads the samples if they do not reach back far enough."""
        due = _due(self._state)
        if due == _START_OVER:
            self._start_over()
        if due != _LEARN:
            return
        state = self._state[0]
        sampled, clock, unit = int(state["sampled"]), float(state["clock"]), float(state["unit"])
        state["learned"] = sampled
        state["lru_reach"] = learn(self._samples, self._widths, clock, unit, self._worth)
        if sampled >= ROOM:
            reach = (clock - float(self._samples["start"].min())) / unit
            if reach < SPAN:
                state["period"] *= 2
            elif reach > 4 * SPAN and state["period"] > 1:
                state["period"] //= 2

    def _start_over(self) -> None:
        """Forgets what was learned and is LRU for a while: the longer, the more often that has happened in a row."""
        state = self._state[0]
        state["sampled"] = state["learned"] = 0
        state["lead"] = state["spread"] = 0.0
        state["resume"] = state["clock"] + state["trial"] * state["unit"]
        state["trial"] = min(64 * START, 2 * state["trial"])
        self._samples["weight"] = 0
        self._waiting[:] = 0
        # The older, the less worth, whatever the kind.
        self._worth[:] = 1 / (1 + np.arange(AGES, dtype=np.float32))
