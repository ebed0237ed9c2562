"""Instances in turns."""

from collections.abc import Sequence

from cairn.cluster.values import Role
from cairn.serve.scheduling.base import Ask, Choice, InstanceView, Send


class RoundRobin:
    """Of those that may decode, each in its turn; prefill goes to those that do only that, in turns too."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        self._turn += 1
        prefills = [one for one in view if one.role is Role.PREFILL]
        others = [one for one in view if one.role is not Role.PREFILL] or view
        chosen = others[self._turn % len(others)]
        first = prefills[self._turn % len(prefills)].id if prefills and chosen.role is Role.DECODE else None
        return Send(chosen.id, first)

    def sent(self, request: Ask, choice: Send, now: float) -> None: ...

    def first_token(self, request: Ask, now: float) -> None: ...

    def finished(self, request: Ask, now: float, tokens: int) -> None: ...

    def failed(self, request: Ask, now: float) -> None: ...
