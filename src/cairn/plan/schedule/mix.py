"""Which side of a disaggregated fleet its MIX instances are on: prefill or decode, by pressure, with hysteresis.

One instance changes sides when its new side is under pressure (`act`) and its old one would still have room without it
(`spare`, below `act`). So under a constant load none ever changes back: its old side would have to come to `act`, and
was foreseen at `spare`. Smoothing and a time between two changes do the rest for loads that are not constant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cairn.plan.role import Role
from cairn.plan.schedule.base import TBT_SLO_S, TTFT_SLO_S

_AWAY = 64
"""Instances that are away and yet remembered, beside twice as many as are there."""


class Side(NamedTuple):
    """One side of the fleet. pressure: its load as a share of what the SLO allows, a mean over its instances."""

    pressure: float
    instances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSettings:
    """ttft_slo_s, tbt_slo_s: what pressures are shares of, whatever a single request brings. For the rest see above."""

    ttft_slo_s: float = TTFT_SLO_S
    tbt_slo_s: float = TBT_SLO_S
    act: float = 0.7
    spare: float = 0.4
    smooth_s: float = 5.0
    dwell_s: float = 10.0


def needed(prefill: Side, decode: Side, settings: MixSettings) -> Role | None:
    """The side that one more instance should be on, PREFILL or DECODE; None: leave them. Pure.

    A side that loses one of n takes the load of n on n - 1, and no side loses its last.
    """
    for role, gains, gives in ((Role.PREFILL, prefill, decode), (Role.DECODE, decode, prefill)):
        if gives.instances > 1 and gains.pressure >= settings.act:
            left = gives.pressure * gives.instances / (gives.instances - 1)
            if left <= settings.spare:
                return role
    return None


class MixRoles:
    """The sides of MIX instances by name. Not thread-safe. A newcomer joins the side with fewer of them."""

    def __init__(self, settings: MixSettings | None = None) -> None:
        self._settings = settings or MixSettings()
        self._roles: dict[str, Role] = {}
        self._prefill = self._decode = 0.0
        self._at = -math.inf
        self._changed = -math.inf

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def meet(self, names: Sequence[str]) -> None:
        """These MIX instances may be sent to now. Of others the side is remembered: they may rest after a failure, or
        serve another model.
        """
        if all(name in self._roles for name in names):
            return
        if len(self._roles) > 2 * len(names) + _AWAY:
            self._roles = {name: self._roles[name] for name in names if name in self._roles}
        for name in names:
            if name not in self._roles:
                here = [self._roles[one] for one in names if one in self._roles]
                fewer = Role.PREFILL if 2 * here.count(Role.PREFILL) < len(here) else Role.DECODE
                self._roles[name] = fewer

    def observe(self, prefill: Side, decode: Side, idlest: Sequence[str], now: float) -> None:
        """Takes pressures in, and lets one instance change sides if that is due: the first of `idlest` that can."""
        keep = math.exp(-(now - self._at) / self._settings.smooth_s)
        self._at = now
        self._prefill = keep * self._prefill + (1 - keep) * prefill.pressure
        self._decode = keep * self._decode + (1 - keep) * decode.pressure
        if now - self._changed < self._settings.dwell_s:
            return
        role = needed(prefill._replace(pressure=self._prefill), decode._replace(pressure=self._decode), self._settings)
        changing = next((name for name in idlest if role and self._roles.get(name, role) is not role), None)
        if role and changing:
            self._roles[changing] = role
            self._changed = now
