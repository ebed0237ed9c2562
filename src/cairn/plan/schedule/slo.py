"""SLO-and-cache-aware scheduling: where a request meets its SLO, and costs the fleet least. The default.

Among the instances that are predicted to meet the request's SLO, the one with the least

    ttft + burden * compute

takes it: `compute`, the prefill that its cache does not save, is counted once more, because all that come later wait
for it too. So a prefix draws requests to its holder as long as the queue there costs less than computing it anew; after
that another instance computes it, and then holds it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cairn.plan.schedule.base import Ask, Choice, InstanceView, Send, Shed, Wait
from cairn.plan.schedule.estimate import Estimates
from cairn.plan.schedule.picking import Booked, able, least, nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    """margin: predicted TTFTs are taken as so much longer. burden: see above. queue_s: of prefill at an instance at
    most; beyond it requests wait here, where the one with the least slack is next. late_s: how long a request waits for
    room that could not meet its SLO on an idle instance either. late_pressure: share of the fleet's SLO that may be
    queued for such a request to be let in.
    """

    margin: float = 1.1
    burden: float = 1.0
    queue_s: float = 1.0
    late_s: float = 20.0
    late_pressure: float = 0.1
    recheck_s: float = 0.05


class SloAware(Booked):
    name: ClassVar[str] = "slo_aware"

    def __init__(self, settings: SloSettings | None = None) -> None:
        super().__init__()
        self._settings = settings or SloSettings()

    def choose(self, request: Ask, view: Sequence[InstanceView], now: float) -> Choice:
        self._turn += 1
        here, _ = able(view)
        if not here:
            return nobody()
        slots = self._ledger.slots(here)
        found = self._ledger.estimates(request, slots, now)
        s = self._settings
        waited = now - request.arrived
        ttft = found["ttft_s"]
        fits = (found["tpot_s"] <= request.tbt_slo_s) & found["room"]
        in_time = (waited + s.margin * ttft <= request.ttft_slo_s) | ~found["known"]
        short = found["queue_s"] <= s.queue_s
        best = self._best(found, fits & in_time & short)
        if best >= 0:
            return Send(here[best].id, None, float(ttft[best]))
        idle = s.margin * float((found["load_s"] + found["compute_s"]).min())
        if idle > request.ttft_slo_s:
            return self._late(request, here, found, fits, now)
        if waited + idle > request.ttft_slo_s or not (in_time.any()):
            return Shed(max(1.0, float(found["queue_s"].min())), "its first token would come too late")
        return Wait(now + s.recheck_s)

    def _late(
        self, request: Ask, here: Sequence[InstanceView], found: Estimates, fits: npt.NDArray[np.bool_], now: float
    ) -> Choice:
        s = self._settings
        pressure = float(np.minimum(found["queue_s"] / request.ttft_slo_s, 1.0).mean())
        if pressure <= s.late_pressure:
            best = self._best(found, fits & (found["queue_s"] <= 0))
            if best >= 0:
                return Send(here[best].id, None, float(found["ttft_s"][best]))
        if now - request.arrived >= s.late_s:
            return Shed(s.late_s, "it is too long for its SLO, and the fleet is busy")
        return Wait(min(now + 4 * s.recheck_s, request.arrived + s.late_s))

    def _best(self, found: Estimates, allowed: npt.NDArray[np.bool_]) -> int:
        score = np.where(allowed, found["ttft_s"] + self._settings.burden * found["compute_s"], np.inf)
        return least(score, self._turn)
