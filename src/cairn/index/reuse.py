"""Learning, online, when blocks of each kind are asked for again, and what keeping one is worth.

*Samples.* Of every request, or of every n-th in a large cache, one block of each run of equal kinds is sampled, whether
resident or not: its kind, and the time until it is asked for again. A run stands for all its blocks, since a request
comes back as a whole, yet it is one observation: weighed by length, a few long prompts would drown the rest; unweighed,
they would count for too little. So it weighs the root of its length. Only the last `ROOM` samples are kept, so what is
learned neither depends on what the cache happened to keep nor grows old (sampled reuse times: Waldspurger et al.,
SHARDS, FAST'15).

*Hazards.* Per kind and age: uses per block and unit of time among the samples that have reached that age, where those
still waiting count as far as they have come (the actuarial form of Kaplan and Meier's estimator). A kind with few
samples borrows from its group, a group with few from all.

*Worth.* Keeping a block from age a to age b yields a chance of a hit and costs slot-time. The worth at age a is the
best ratio of the two over all b: Gittins' index (1979), of which LHD's hit density (Beckmann et al., NSDI'18) is the
case of one given b. Evicting what is worth least is optimal for many small independent blocks of known hazards. It asks
for no monotony: where conversations go on after a minute, a block of half a minute is worth more than a new one.

Time is counted in blocks asked for, not in seconds, so neither load nor odd clocks stretch it.
"""

import math

import numpy as np
import numpy.typing as npt

from cairn.index.kinds import KINDS, LEVELS, group_of
from cairn.index.table import Table, table_delete, table_find, table_insert
from cairn.jit import kernel

ROOM = 12288
AGES, PER_OCTAVE = 72, 4

SAMPLE = np.dtype(
    [
        ("key0", np.uint64),
        ("key1", np.uint64),
        ("start", np.float64),
        ("gap", np.float32),  # until the next use; WAITING before it
        ("weight", np.float32),  # the root of how many blocks it stands for; 0: no sample
        ("kind", np.uint16),
    ],
    align=True,
)
WAITING = -1.0

BORROW_GROUP, BORROW_KIND = 10.0, 40.0
"""How many average samples of the larger group's pattern a group or a kind is given in advance."""

Samples = npt.NDArray[np.void]
Worth = npt.NDArray[np.float32]
Rows = npt.NDArray[np.float64]


def new_samples() -> Samples:
    return np.zeros(ROOM, SAMPLE)


@kernel
def age_bucket(age: float, unit: float) -> int:
    """Ages from unit / 2**8 to unit * 2**10 in quarter octaves; `unit` is the cache's capacity in blocks."""
    if age <= unit / 256:
        return 0
    return min(AGES - 1, 1 + int(PER_OCTAVE * (math.log2(age / unit) + 8)))


def bucket_widths(unit: float) -> npt.NDArray[np.float64]:
    edges = np.concatenate([[0.0], unit * 2.0 ** (np.arange(AGES) / PER_OCTAVE - 8)])
    return np.diff(edges)


@kernel
def end_sample(samples: Samples, waiting: Table, key0: np.uint64, key1: np.uint64, clock: float) -> None:
    """A block is used: if an earlier use of it was sampled and is waiting, this is how long it waited."""
    at = table_find(waiting, samples, key0, key1)
    if at >= 0:
        samples[at].gap = clock - samples[at].start
        table_delete(waiting, samples, at)


@kernel
def begin_sample(
    samples: Samples, waiting: Table, at: int, key0: np.uint64, key1: np.uint64, kind: int, weight: float, clock: float
) -> None:
    """Samples this use in place `at`, over the oldest sample."""
    if samples[at].weight > 0 and samples[at].gap == WAITING:
        table_delete(waiting, samples, at)
    samples[at].key0 = key0
    samples[at].key1 = key1
    samples[at].start = clock
    samples[at].gap = WAITING
    samples[at].kind = kind
    samples[at].weight = weight
    table_insert(waiting, key0, key1, at)


@kernel
def count_samples(samples: Samples, clock: float, unit: float, hits: Rows, exits: Rows) -> None:
    """Per kind and age bucket: the weight of what was used again there, and of what was seen no further than
    there."""
    hits[:] = 0
    exits[:] = 0
    for i in range(len(samples)):
        if samples[i].weight > 0:
            gap = samples[i].gap
            if gap == WAITING:
                exits[samples[i].kind, age_bucket(clock - samples[i].start, unit)] += samples[i].weight
            else:
                bucket = age_bucket(gap, unit)
                hits[samples[i].kind, bucket] += samples[i].weight
                exits[samples[i].kind, bucket] += samples[i].weight


@kernel
def exposure(exits: Rows, widths: npt.NDArray[np.float64], out: Rows) -> None:
    """Weighed time that each kind has spent in each age bucket."""
    for kind in range(exits.shape[0]):
        older = 0.0
        for bucket in range(exits.shape[1] - 1, -1, -1):
            out[kind, bucket] = widths[bucket] * (older + 0.5 * exits[kind, bucket])
            older += exits[kind, bucket]


@kernel
def shrink(
    hits: npt.NDArray[np.float64],
    time: npt.NDArray[np.float64],
    widths: npt.NDArray[np.float64],
    prior: npt.NDArray[np.float64],
    weight: float,
    out: npt.NDArray[np.float64],
) -> None:
    """Hazards of one kind: its own hits over its own time, with `weight` blocks of the prior's shape at its own
    level."""
    own, expected = 0.5 * weight, 0.5 * weight
    for bucket in range(len(widths)):
        own += hits[bucket]
        expected += prior[bucket] * time[bucket]
    level = own / expected if expected > 0 else 1.0
    for bucket in range(len(widths)):
        borrowed = weight * widths[bucket]
        out[bucket] = (hits[bucket] + borrowed * prior[bucket] * level) / (time[bucket] + borrowed)


@kernel
def worth_by_age(
    hazard: npt.NDArray[np.float64], widths: npt.NDArray[np.float64], out: npt.NDArray[np.float64]
) -> None:
    """The worth of a block at the start of each age bucket, from its kind's hazards.

    With H(b) the chance of a hit and C(b) the slot-time up to age b, it is the steepest slope from (C(a), H(a)) to
    any later point: the first edge of the upper hull of what lies ahead, built from the far end in linear time.
    """
    n = len(widths)
    hit = np.zeros(n + 1)
    cost = np.zeros(n + 1)
    alive = 1.0
    for b in range(n):
        chance = -math.expm1(-hazard[b] * widths[b])
        cost[b + 1] = cost[b] + alive * (chance / hazard[b] if hazard[b] > 1e-300 else widths[b])
        hit[b + 1] = hit[b] + alive * chance
        alive = max(alive * (1.0 - chance), 1e-6)  # a floor, so that slopes stay exact where nobody lives
    hull = np.empty(n + 1, np.int64)
    top = 0
    hull[0] = n
    for a in range(n - 1, -1, -1):
        while top > 0:
            near, far = hull[top], hull[top - 1]
            if (hit[near] - hit[a]) * (cost[far] - cost[a]) > (hit[far] - hit[a]) * (cost[near] - cost[a]):
                break
            top -= 1
        time = cost[hull[top]] - cost[a]
        out[a] = (hit[hull[top]] - hit[a]) / time if time > 0 else 0.0
        top += 1
        hull[top] = a


@kernel
def learn(samples: Samples, widths: npt.NDArray[np.float64], clock: float, unit: float, worth: Worth) -> float:
    """Turns the samples into the worth [KINDS, AGES] of each kind at each age; returns how long LRU keeps a block."""
    hits = np.zeros((KINDS, AGES))
    exits = np.zeros((KINDS, AGES))
    time = np.zeros((KINDS, AGES))
    count_samples(samples, clock, unit, hits, exits)
    exposure(exits, widths, time)
    group_hits = np.zeros((LEVELS, AGES))
    group_time = np.zeros((LEVELS, AGES))
    seen, sampled = 0.0, 0
    for kind in range(KINDS):
        level = group_of(kind)
        for age in range(AGES):
            group_hits[level, age] += hits[kind, age]
            group_time[level, age] += time[kind, age]
            seen += exits[kind, age]
    for i in range(len(samples)):
        sampled += samples[i].weight != 0
    run = seen / max(1, sampled)
    all_hits = np.zeros(AGES)
    all_time = np.zeros(AGES)
    for level in range(LEVELS):
        for age in range(AGES):
            all_hits[age] += group_hits[level, age]
            all_time[age] += group_time[level, age]
    nothing = np.full(AGES, 1e-9)
    common = np.empty(AGES)
    shrink(all_hits, all_time, widths, nothing, BORROW_GROUP * run, common)
    group = np.empty((LEVELS, AGES))
    for level in range(LEVELS):
        shrink(group_hits[level], group_time[level], widths, common, BORROW_GROUP * run, group[level])
    hazard = np.empty(AGES)
    row = np.empty(AGES)
    for kind in range(KINDS):
        shrink(hits[kind], time[kind], widths, group[group_of(kind)], BORROW_KIND * run, hazard)
        worth_by_age(hazard, widths, row)
        for age in range(AGES):
            worth[kind, age] = row[age]
    return lru_reach(common, widths, unit)


@kernel
def lru_reach(hazard: npt.NDArray[np.float64], widths: npt.NDArray[np.float64], capacity: float) -> float:
    """How long LRU keeps a block: the time in which as many distinct blocks are used as the cache holds.

    The number of distinct blocks used in a time t grows as the share of uses without another one within t (Denning and
    Schwartz, "Properties of the working-set model", CACM 1972).
    """
    alive, distinct, time = 1.0, 0.0, 0.0
    for bucket in range(len(widths)):
        chance = -math.expm1(-hazard[bucket] * widths[bucket])
        seen = alive * (chance / hazard[bucket] if hazard[bucket] > 1e-300 else widths[bucket])
        if distinct + seen >= capacity:
            return float(time + widths[bucket] * (capacity - distinct) / seen)
        distinct += seen
        time += widths[bucket]
        alive *= 1.0 - chance
    return time
