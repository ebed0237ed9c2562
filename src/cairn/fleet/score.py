"""What a router asks: how good is each source for this prompt?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cairn.fleet.base import Source, Tier
from cairn.fleet.index import FleetIndex
from cairn.fleet.match import Counts
from cairn.fleet.speculation import Speculation
from cairn.kv import as_tokens
from cairn.plan import CostModel, plan_load
from cairn.plan.planner import Segment
from cairn.plan.schedule.base import TIER_WEIGHTS, TIERS

#: What a token held in a tier is worth, next to one in VRAM.
WEIGHTS: Mapping[Tier, float] = dict(zip(Tier, TIER_WEIGHTS, strict=True))

_TIER_NAMES = dict(zip(Tier, TIERS, strict=True))
_EVERY_TIER = tuple(Tier)  # to go through an enum takes a microsecond


class Score(NamedTuple):
    """tokens: of the prompt, by the tier that the source would take them from, in prompt order; score: the higher the
    better; weighted tokens, or seconds saved.
    """

    tokens: Mapping[Tier, int]
    score: float


class SecondsSaved:
    """In place of weights: how much sooner a prompt is ready than if all of it were computed, by the planner's costs.

    cost: its tiers are called vram, dram, disk and remote; what has not been measured loads in no time. token_bytes: of
    KV a token. While no prefill about as long has been measured, scores are weighted tokens after all, for all sources
    alike. Thread-safe.
    """

    def __init__(self, cost: CostModel, token_bytes: int) -> None:
        self._cost = cost
        self._token_bytes = token_bytes

    def knows(self, prompt_tokens: int) -> bool:
        """Whether the time that a prompt takes can be told."""
        return self._cost.recompute.knows(prompt_tokens)

    def of(self, steps: Sequence[int], prompt_tokens: int) -> float:
        """Seconds saved by a source that holds steps[t] tokens in tier t, one tier's behind the other's."""
        segments = [Segment(_TIER_NAMES[tier], steps[tier]) for tier in Tier if steps[tier]]
        plan = plan_load(segments, prompt_tokens, self._token_bytes, self._cost)
        return max(0.0, self._cost.recompute.seconds(prompt_tokens, 0) - plan.seconds)


def score(
    index: FleetIndex,
    tokens: Any,
    sources: Sequence[Source],
    weights: Mapping[Tier, float] | SecondsSaved = WEIGHTS,
    *,
    namespace: bytes = b"",
    speculation: Speculation | None = None,
) -> dict[Source, Score]:
    """A score for each source, 0 where nothing is held or known. tokens: ids [n]; weights: a tier that is left out is
    worth nothing; speculation: what counts as held in VRAM already. Thread-safe. Raises InputError for no tokens.
    """
    ids = as_tokens(tokens)
    beyond = None if speculation is None else lambda begun: speculation.covers(sources, begun)
    found, hashed = index.look_up(ids, {source.instance for source in sources}, namespace, beyond)
    rows = {source: i for i, source in enumerate(found.sources)}
    reach = np.zeros((len(sources), len(Tier)), np.int64)
    for i, source in enumerate(sources):
        if source in rows:
            reach[i] = found.reach[rows[source]]
    if speculation:
        reach = np.maximum(reach, speculation.tokens(sources, hashed)[:, None])
    steps = reach.copy()
    steps[:, 1:] -= reach[:, :-1]
    values = _values(steps, len(ids), weights)
    return {
        source: Score(dict(zip(_EVERY_TIER, row, strict=True)), value)
        for source, row, value in zip(sources, steps.tolist(), values, strict=True)
    }


def _values(steps: Counts, prompt_tokens: int, weights: Mapping[Tier, float] | SecondsSaved) -> list[float]:
    if isinstance(weights, SecondsSaved):
        if weights.knows(prompt_tokens):
            rows = [tuple(row) for row in steps.tolist()]
            saved = {row: weights.of(row, prompt_tokens) for row in set(rows)}  # most sources hold nothing
            return [saved[row] for row in rows]
        weights = WEIGHTS
    values: list[float] = (steps @ np.array([weights.get(tier, 0.0) for tier in Tier])).tolist()
    return values
