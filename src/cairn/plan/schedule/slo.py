"""SLO-and-cache-aware scheduling: of the instances where a request meets its SLO, the one that is soonest. The default.

The predicted TTFT has everything in it: the queue, what the cache holds, what loading the rest costs. So a prefix draws
requests to its holder as long as the queue there costs less than computing the prefix anew; after that another instance
computes it, and from then on holds it too: what is hot is replicated, as often as it is hot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cairn.plan.schedule.base import Ask, Choice, InstanceView, Send, Shed, Wait
from cairn.plan.schedule.estimate import Estimates, soonest
from cairn.plan.schedule.picking import Booked, least, nobody
from cairn.plan.schedule.sides import Sides

_TIE_S = 0.005
"""Predictions as close as this are equal: nobody notices, and measurements are no better."""

Mask = npt.NDArray[np.bool_]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    """margin: predicted TTFTs are taken as so many times longer.

    A request that could not meet its SLO on an idle instance either is let in where nobody queues, while at most
    `late_pressure` of the seconds that the SLO allows are queued in the fleet; it waits `late_s` for that at most.
    recheck_s: the tick at which all who wait are asked for again.
    """

    margin: float = 1.1
    late_s: float = 20.0
    late_pressure: float = 0.1
    recheck_s: float = 0.05


class SloAware(Booked):
    name: ClassVar[str] = "slo_aware"

    def __init__(self, settings: SloSettings | None = None) -> None:
        super().__init__()
        self._settings = settings or SloSettings()
        self.sides = Sides()

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        self._turn += 1
        here = [one for one in view if one.available]
        if not here:
            return nobody()
        left_s = (request.ttft_slo_s - (now - request.arrived)) / self._settings.margin
        found, best = self._ledger.compare(request, self._ledger.slots(here), now, left_s, self._turn, _TIE_S)
        send = self._send(request, here, found, best, now)
        if send:
            return send
        idle = self._settings.margin * float((found["load_s"] + found["compute_s"]).min())
        if idle > request.ttft_slo_s:
            return self._late(request, here, found, now)
        if found["slack_s"].max() < 0:
            return Shed(max(1.0, float(found["queue_s"].min())), "its first token would come too late")
        return self._wait(now)

    def _late(self, request: Ask, here: Sequence[InstanceView], found: Estimates, now: float) -> Choice:
        s = self._settings
        pressure = float(np.minimum(found["queue_s"] / request.ttft_slo_s, 1.0).mean())
        if pressure <= s.late_pressure:
            found["slack_s"] = np.where(found["queue_s"] <= 0, np.inf, -np.inf)  # in time where nobody queues
            best = soonest(found, np.ones(len(here), np.bool_), self._turn, _TIE_S)
            send = self._send(request, here, found, best, now)
            if send:
                return send
        if now - request.arrived >= s.late_s:
            return Shed(s.late_s, "it is too long for its SLO, and the fleet is busy")
        return self._wait(now, 10)

    def _wait(self, now: float, ticks: int = 1) -> Wait:
        """Until the next tick, one for all who wait, so that the one with the least slack is asked for first."""
        tick = ticks * self._settings.recheck_s
        return Wait((math.floor(now / tick) + 1) * tick)

    def _send(self, request: Ask, here: Sequence[InstanceView], found: Estimates, best: int, now: float) -> Send | None:
        """The soonest way that is in time. best: the soonest instance, whatever its side."""
        sides = self.sides.of(here, found, request, now)
        if sides is None:
            return Send(here[best].id, None, float(found["ttft_s"][best])) if best >= 0 else None
        whole, ttft = soonest(found, sides.whole, self._turn, _TIE_S), found["ttft_s"]
        then = self._least(found["move_s"] + found["tpot_s"], sides.decode & found["fits"])
        first = self._least(ttft.copy(), sides.prefill & (found["slack_s"] >= found["move_s"][then]))
        apart = ttft[first] + found["move_s"][then] if first >= 0 and then >= 0 else np.inf
        if whole >= 0 and ttft[whole] <= apart:
            return Send(here[whole].id, None, float(ttft[whole]))
        if apart == np.inf:
            return None
        return Send(here[then].id, here[first].id, float(apart))

    def _least(self, seconds: Seconds, allowed: Mask) -> int:
        return least(seconds, allowed, self._turn, _TIE_S)
