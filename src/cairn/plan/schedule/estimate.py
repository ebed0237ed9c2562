"""What an instance would make of a request, in seconds: one kernel for all instances at once.

    compute = slow (a + b n + c n (context + n / 2))      n: tokens that are not loaded, at least one
    load    = sum over tiers of latency + tokens / speed
    ttft    = max(queue, load) + compute                  loading goes on while others are computed
    tpot    = d + e (decoding + 1)

The split between load and compute is the engine's own: the end of a segment at which load + compute is least
(`plan_load`). The fit is the instance's, or that of the whole fleet where the instance's own has seen nothing as long.
"""

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel
from cairn.plan.schedule.base import TIERS

_N = len(TIERS)

BOOK = np.dtype(
    [
        ("pending_s", np.float64),  # predicted prefill seconds of what was sent and has no first token yet
        ("head_s", np.float64),  # of the oldest of these, which is at work ...
        ("since", np.float64),  # ... since then
        ("requests", np.int64),  # sent and not ended
        ("decoding", np.int64),  # of these, those with a first token
        ("kv_used", np.int64),  # tokens of KV that they may need; the fields up to here are written as one (`Ledger`)
        ("kv_tokens", np.int64),  # that there is room for; 0: not known
        ("reported_at", np.float64),
        ("foreign", np.int64),  # requests of others, by the last report
        ("foreign_decoding", np.int64),
        ("foreign_s", np.float64),  # prefill seconds of others' queued tokens at that time
        ("prefill", np.float64, 3),  # a, b, c
        ("known", np.float64),  # the longest prompt that this fit is good for
        ("slow", np.float64),  # measured over predicted, lately
        ("latency_s", np.float64, _N),  # of a load, by tier
        ("token_s", np.float64, _N),
        ("decode", np.float64, 2),  # d, e
    ]
)

ESTIMATE = np.dtype(
    [
        ("ttft_s", np.float64),
        ("queue_s", np.float64),
        ("load_s", np.float64),
        ("compute_s", np.float64),
        ("tpot_s", np.float64),
        ("move_s", np.float64),  # to bring the prompt's KV here through the shared tier, but what is held
        ("kv_share", np.float64),  # of its KV memory that is taken; 0 where that is not known
        ("missing", np.int64),  # tokens to compute
        ("slack_s", np.float64),  # by how much the first token would be early; infinite where nothing can be said
        ("fits", np.bool_),  # whether it may decode there
    ]
)

Books = npt.NDArray[np.void]
Estimates = npt.NDArray[np.void]
Slots = npt.NDArray[np.int64]
#: a, b, c, known: the fit over all instances.
FleetFit = npt.NDArray[np.float64]


@kernel
def queue_seconds(books: Books, slot: int, now: float) -> float:
    """Prefill seconds ahead of a request that comes now; the head's elapsed part is off, at most all of it."""
    book = books[slot]
    own: float = book.pending_s - min(max(now - book.since, 0.0), book.head_s)
    foreign: float = book.foreign_s - max(now - book.reported_at, 0.0) if book.foreign_s > 0 else 0.0
    return max(own, 0.0) + max(foreign, 0.0)


@kernel
def _compute(a: float, b: float, c: float, prompt: int, split: int) -> float:
    n = max(1, prompt - split)
    seconds: float = a + b * n + c * n * (prompt - n + n / 2)
    return seconds


@kernel
def soonest(found: Estimates, allowed: npt.NDArray[np.bool_], turn: int, tie_s: float) -> int:
    """The index of the least TTFT of what is allowed, fits and is in time; of those no more than `tie_s` above it the
    first from `turn` on, cyclically. -1: there is none.
    """
    low = np.inf
    for i in range(len(found)):
        if allowed[i] and found[i].fits and found[i].slack_s >= 0:
            low = min(low, found[i].ttft_s)
    for step in range(len(found)):
        i = (turn + step) % len(found)
        if allowed[i] and found[i].fits and found[i].slack_s >= 0 and found[i].ttft_s <= low + tie_s:
            return i
    return -1


@kernel
def estimate(
    books: Books,
    slots: Slots,
    held: npt.NDArray[np.int64],
    fleet: FleetFit,
    prompt: int,
    answer: int,
    now: float,
    left_s: float,
    tbt_slo_s: float,
    turn: int,
    tie_s: float,
    out: Estimates,
) -> int:
    """Fills out[i] for slots[i], which holds held[i, tier] tokens of the prompt in each tier. left_s: then the
    first token is late. Gives the `soonest` of all.

    An idle instance always fits: it will not get better, and only what is sent there tells what it can do.
    """
    for i in range(len(slots)):
        book = books[slots[i]]
        own = prompt <= book.known or book.known >= fleet[3]
        a, b, c = (book.prefill[0], book.prefill[1], book.prefill[2]) if own else (fleet[0], fleet[1], fleet[2])
        slow = book.slow
        split, load, best_load, best_split = 0, 0.0, 0.0, 0
        best = _compute(a, b, c, prompt, 0) * slow
        for tier in range(_N):
            tokens = held[i, tier]
            if tokens == 0:
                continue
            split += tokens
            load += book.latency_s[tier] + book.token_s[tier] * tokens
            total = load + _compute(a, b, c, prompt, split) * slow
            if total <= best:
                best, best_load, best_split = total, load, split
        queue = queue_seconds(books, slots[i], now)
        out[i].queue_s = queue
        out[i].load_s = best_load
        out[i].compute_s = best - best_load
        out[i].ttft_s = max(queue, best_load) + best - best_load
        beside = book.decoding + book.foreign_decoding
        out[i].tpot_s = book.decode[0] + book.decode[1] * (beside + 1)
        out[i].missing = max(1, prompt - best_split)
        out[i].move_s = book.latency_s[_N - 1] + book.token_s[_N - 1] * max(0, prompt - split)
        out[i].kv_share = book.kv_used / book.kv_tokens if book.kv_tokens else 0.0
        known = prompt <= max(book.known, fleet[3])  # prefills as long have been seen
        out[i].slack_s = left_s - out[i].ttft_s if known else np.inf
        room = book.kv_tokens == 0 or book.kv_used + prompt + answer <= book.kv_tokens
        out[i].fits = (out[i].tpot_s <= tbt_slo_s and room) or book.requests + book.foreign == 0
    return soonest(out, out["fits"], turn, tie_s)
