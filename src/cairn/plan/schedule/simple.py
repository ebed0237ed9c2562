"""The policies that know no seconds: round robin, least loaded, and prefix-cache aware."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cairn.plan.schedule.base import TIER_WEIGHTS, TIERS, Ask, InstanceView
from cairn.plan.schedule.estimate import Slots
from cairn.plan.schedule.picking import Picking

_WEIGHTS = dict(zip(TIERS, TIER_WEIGHTS, strict=True))


class RoundRobin(Picking):
    """Each instance in turn: the baseline of all others."""

    name: ClassVar[str] = "round_robin"

    def scores(self, request: Ask, view: Sequence[InstanceView], slots: Slots) -> npt.NDArray[np.float64]:
        return np.zeros(len(view))


class LeastLoaded(Picking):
    """The instance with the fewest requests in flight."""

    name: ClassVar[str] = "least_loaded"

    def scores(self, request: Ask, view: Sequence[InstanceView], slots: Slots) -> npt.NDArray[np.float64]:
        return self._ledger.in_flight(slots).astype(np.float64)


class PrefixAware(Picking):
    """The instance that holds most of the prompt, weighted by tier; the fewest requests in flight among equals.

    Least loaded where too little is held to matter (`share` of the prompt), and while the fleet is out of balance: the
    busiest has `ratio` times the requests of the idlest, and `gap` more. Without that rule a prompt that all share
    piles onto one instance.
    """

    name: ClassVar[str] = "prefix_aware"

    def __init__(self, share: float = 0.3, gap: int = 8, ratio: float = 1.5) -> None:
        super().__init__()
        self._share, self._gap, self._ratio = share, gap, ratio

    def scores(self, request: Ask, view: Sequence[InstanceView], slots: Slots) -> npt.NDArray[np.float64]:
        load = self._ledger.in_flight(slots).astype(np.float64)
        idlest, busiest = load.min(), load.max()
        if busiest - idlest > self._gap and busiest > self._ratio * idlest:
            return load
        worth = np.array([self._worth(request, one) for one in view])
        if worth.max() < self._share * request.prompt_tokens:
            return load
        preferred: npt.NDArray[np.float64] = load - worth * (busiest + 1)
        return preferred

    @staticmethod
    def _worth(request: Ask, one: InstanceView) -> float:
        held = request.held.get(one.id)
        return sum(_WEIGHTS[tier] * tokens for tier, tokens in held.items()) if held else 0.0
