"""Learning, online, when blocks of each class are used again: samples, hazards, and what keeping a block is worth.

*Samples.* Of all uses of all blocks, resident or not, a fixed share is sampled: the block's class at that use and the
time until its next use. The last `ROOM` samples are kept, so what is learned neither depends on what the cache
happened to keep nor grows old (spatially sampled reuse times: Waldspurger et al., SHARDS, FAST'15).

*Hazards.* Per class and age: uses per block and unit of time among the samples that reached that age, those still
waiting for their next use counted as far as they have come (the actuarial form of Kaplan and Meier's estimator). A
class with few samples borrows from its group, a group with few from all.

*Worth.* Keeping a block of age a until age b at most yields a chance of a hit and costs slot-time. The worth at age a
is the best ratio of the two over all b: Gittins' index (1979), of which LHD's hit density (Beckmann et al., NSDI'18)
is the case of one fixed b. Evicting what has the least worth is optimal for many small independent blocks of known
hazards. It needs no monotony: where a conversation's return is likeliest after a minute, a block of half a minute is
worth more than a new one.

Times are counted in block uses, not seconds: load and odd clocks then stretch nothing.
"""

import math

import numpy as np
import numpy.typing as npt

from cairn.index.table import Table, table_delete, table_find, table_insert
from cairn.jit import kernel

ROOM = 16384
PERIOD = 8
AGES, PER_OCTAVE = 72, 4

SAMPLE = np.dtype(
    [
        ("key0", np.uint64),
        ("key1", np.uint64),
        ("start", np.float64),
        ("gap", np.float32),  # until the next use; WAITING before it
        ("kind", np.uint16),
        ("used", np.uint16),  # whether this place holds a sample
    ],
    align=True,
)
WAITING = -1.0

Samples = npt.NDArray[np.void]
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
    samples: Samples, waiting: Table, at: int, key0: np.uint64, key1: np.uint64, kind: int, clock: float
) -> None:
    """Samples this use in place `at`, over the oldest sample."""
    if samples[at].used and samples[at].gap == WAITING:
        table_delete(waiting, samples, at)
    samples[at].key0 = key0
    samples[at].key1 = key1
    samples[at].start = clock
    samples[at].gap = WAITING
    samples[at].kind = kind
    samples[at].used = 1
    table_insert(waiting, key0, key1, at)


@kernel
def count_samples(samples: Samples, clock: float, unit: float, hits: Rows, exits: Rows) -> None:
    """Per class and age bucket: how many samples were used again there, and how many were seen no further than
    there."""
    hits[:] = 0
    exits[:] = 0
    for i in range(len(samples)):
        if samples[i].used:
            gap = samples[i].gap
            if gap == WAITING:
                exits[samples[i].kind, age_bucket(clock - samples[i].start, unit)] += 1
            else:
                bucket = age_bucket(gap, unit)
                hits[samples[i].kind, bucket] += 1
                exits[samples[i].kind, bucket] += 1


@kernel
def exposure(exits: Rows, widths: npt.NDArray[np.float64], out: Rows) -> None:
    """Block-time that each class has spent in each age bucket."""
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
    """Hazards of one class: its own hits over its own time, with `weight` blocks of the prior's shape at its own
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
    """The worth of a block at the start of each age bucket, from its class's hazards.

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
