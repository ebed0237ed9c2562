"""Requests that wait for an instance: who is asked for next, so that nobody is passed over for ever.

Order is by priority, then by the time at which the first token is due: least slack first. Time that passes does not
change the order, and whoever comes later with the same SLO is due later, so only finitely many of its own priority ever
stand before a request.
"""

from typing import NamedTuple

from cairn.plan.schedule.base import Ask


class _Place(NamedTuple):
    order: tuple[int, float, int]
    until: float
    request: Ask


class WaitingRoom:
    """Holds requests that were told to `Wait`. Not thread-safe. `len()`: how many."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def put(self, request: Ask, until: float) -> None:
        """It is to be asked for again at `until`; one that is in the room already keeps its place in the order."""
        place = self._places.get(request.id)
        self._count += 1
        order = place.order if place else (-request.priority, request.arrived + request.ttft_slo_s, self._count)
        self._places[request.id] = _Place(order, until, request)

    def remove(self, request: Ask) -> None:
        """It was sent, shed, or given up by its client. One that is not in the room is ignored."""
        self._places.pop(request.id, None)

    def due(self, now: float) -> list[Ask]:
        """Those whose time is up, in the order in which to ask for them. They stay until they are removed."""
        return [place.request for place in sorted(p for p in self._places.values() if p.until <= now)]

    def next(self) -> float | None:
        """When the next one's time is up; None: nobody waits."""
        return min((place.until for place in self._places.values()), default=None)
