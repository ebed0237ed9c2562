"""What schedulers have in common: who may be chosen, what they remember, and how ties are broken."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel
from cairn.plan.role import Role
from cairn.plan.schedule.base import Ask, Choice, InstanceView, Send, Shed
from cairn.plan.schedule.estimate import Slots
from cairn.plan.schedule.ledger import Ledger

_BOTH = (Role.DEFAULT, Role.MIX)


class Able(NamedTuple):
    """The available instances that may prefill, and those that may decode; the same list if all do everything."""

    prefill: list[InstanceView]
    decode: list[InstanceView]


def able(view: Sequence[InstanceView]) -> Able:
    """If a side has nobody, all do everything."""
    here = [one for one in view if one.available]
    prefill = [one for one in here if one.role is not Role.DECODE]
    decode = [one for one in here if one.role is not Role.PREFILL]
    if not prefill or not decode or all(one.role in _BOTH for one in here):
        return Able(here, here)
    return Able(prefill, decode)


def nobody(retry_after_s: float = 1.0) -> Shed:
    return Shed(retry_after_s, "no instance is available")


@kernel
def least(scores: npt.NDArray[np.float64], allowed: npt.NDArray[np.bool_], turn: int, tie: float = 0.0) -> int:
    """The index of the least score that is allowed; of those no more than `tie` above it the first from `turn` on,
    cyclically. -1: none is allowed, or all are infinite.
    """
    low = np.inf
    for i in range(len(scores)):
        if allowed[i]:
            low = min(low, scores[i])
    for step in range(len(scores)):
        i = (turn + step) % len(scores)
        if allowed[i] and scores[i] <= low + tie and scores[i] < np.inf:
            return i
    return -1


class Booked:
    """The half of a scheduler that remembers what was sent and learns from what became of it."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._turn = 0

    def sent(self, request: Ask, choice: Send, now: float) -> None:
        self._ledger.sent(request, choice, now)

    def first_token(self, request: Ask, now: float) -> None:
        self._ledger.first_token(request, now)

    def finished(self, request: Ask, now: float, tokens: int) -> None:
        self._ledger.finished(request, now, tokens)

    def failed(self, request: Ask, now: float) -> None:
        self._ledger.failed(request, now)


class Picking(Booked, ABC):
    """A scheduler that sends every request at once to the instance with the least score.

    In a disaggregated fleet one is picked for the prefill, and if its role is no more than that, one for the decode.
    """

    name: ClassVar[str]

    @abstractmethod
    def scores(self, request: Ask, view: Sequence[InstanceView], slots: Slots) -> npt.NDArray[np.float64]:
        """One for each of `view`; the least is picked."""

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        self._turn += 1
        prefilling, decoding = able(view)
        if not prefilling:
            return nobody()
        first = self._pick(request, prefilling)
        if prefilling is decoding or first.role in _BOTH:
            return Send(first.id)
        return Send(self._pick(request, decoding).id, first.id)

    def _pick(self, request: Ask, view: Sequence[InstanceView]) -> InstanceView:
        slots = self._ledger.slots(view)
        return view[least(self.scores(request, view, slots), np.ones(len(view), np.bool_), self._turn)]
