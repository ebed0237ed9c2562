"""Load or recompute: how much of a prefix hit is worth loading, and what is worth keeping for it."""

from collections.abc import Sequence
from typing import NamedTuple

from cairn.plan.cost import CostModel

#: How many times slower than computing a tier may be and still be written: it is read faster when it is not written
#: at the same time, and serves those, too, whose computer is busy.
WRITE_MARGIN = 2.0


class Segment(NamedTuple):
    """Consecutive tokens of a prompt that one tier holds. Segments follow one another."""

    tier: str
    tokens: int


class Plan(NamedTuple):
    """The cheapest split found: load the next `tokens` tokens, recompute the rest.

    seconds: expected for the whole prompt, NaN while prefill has not been measured.
    """

    tokens: int
    seconds: float


def plan_load(
    segments: Sequence[Segment], prompt_tokens: int, token_bytes: int, cost: CostModel, *, start: int = 0
) -> Plan:
    """Chooses how many of the held tokens to load so that the whole prompt is ready soonest.

    The engine has the first `start` tokens already; segments follow from there on.

    Only the ends of segments can be best: loading grows linearly with the split inside a segment while what recomputing
    saves grows at least linearly (attention makes later tokens dearer), so their sum is concave there. Until prefills
    about as long have been measured everything held is loaded. At least one token always remains to be computed,
    whatever is held.
    """
    held = sum(segment.tokens for segment in segments)
    if not cost.recompute.knows(prompt_tokens - start, start):
        return Plan(held, float("nan"))

    def computing(split: int) -> float:
        rest = max(1, prompt_tokens - split)
        return cost.recompute.seconds(rest, max(0, prompt_tokens - rest))

    best = Plan(0, computing(start))
    split, loading = start, 0.0
    for segment in segments:
        split += segment.tokens
        loading += cost.load_seconds(segment.tier, segment.tokens * token_bytes)
        seconds = loading + computing(split)
        if seconds < best.seconds:
            best = Plan(split - start, seconds)
    return best


def worth_writing(tier: str, first: int, tokens: int, token_bytes: int, cost: CostModel) -> bool:
    """Whether a tier should be given `tokens` tokens behind `first` others: not if loading them from it would take
    more than WRITE_MARGIN times as long as computing them, so that `plan_load` would leave them there.

    True until both have been measured.
    """
    if not cost.recompute.knows(tokens, first):
        return True
    return cost.load_seconds(tier, tokens * token_bytes) <= WRITE_MARGIN * cost.recompute.seconds(tokens, first)
