"""Which side of a disaggregated fleet its MIX instances are on: prefill or decode, by pressure, with hysteresis.

One instance changes sides when its new side is under pressure (`act`) and its old one would still have room without it
(`spare`, below `act`). So under a constant load none ever changes back: its old side would have to come to `act`, and
was foreseen at `spare`. Smoothing and a time between two changes do the rest for loads that are not constant.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from cairn.plan.role import Role
from cairn.plan.schedule.base import TBT_SLO_S, TTFT_SLO_S

#: Seconds after which an instance that is away is forgotten.
_FORGET_S: Final = 600.0


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


@dataclass(slots=True)
class _Fleet:
    """The instances of one model. prefill, decode: pressures, smoothed. at, changed: when they were seen, and when the
    last instance changed sides.
    """

    prefill: float = 0.0
    decode: float = 0.0
    at: float = -math.inf
    changed: float = -math.inf


class MixRoles:
    """The sides of MIX instances by name. Not thread-safe. A newcomer joins the side with fewer of them; who is away
    for a while, as it rests or serves another model than a request asks for, comes back to its own.

    roles: what holds now. Where others schedule for the same fleet, one decides and the rest `follow`: else an instance
    would prefill for one of them and decode for another.
    """

    def __init__(self, settings: MixSettings | None = None) -> None:
        self._settings = settings or MixSettings()
        self._roles: dict[str, Role] = {}
        self.roles: Mapping[str, Role] = MappingProxyType(self._roles)
        self._seen: dict[str, float] = {}
        self._told: Mapping[str, Role] | None = None
        self._fleets: dict[str, _Fleet] = {}

    def follow(self, told: Mapping[str, Role] | None, now: float) -> None:
        """Takes sides from whoever decides, also of instances that come later; None: decides from now on, beginning
        with what holds, of instances that it has not met, too.
        """
        if told is not None:
            self._roles.update({name: role for name, role in told.items() if name in self._roles})
        elif self._told is not None:
            for name, role in self._told.items():
                self._roles.setdefault(name, role)
                self._seen.setdefault(name, now)
        self._told = told

    def meet(self, names: Sequence[str], now: float) -> None:
        """These MIX instances are there."""
        known = [self._roles[name] for name in names if name in self._roles]
        for name in names:
            if name not in self._roles:
                fewer = Role.PREFILL if 2 * known.count(Role.PREFILL) < len(known) else Role.DECODE
                self._roles[name] = (self._told or {}).get(name, fewer)
                known.append(self._roles[name])
        self._seen.update(dict.fromkeys(names, now))
        for name in [name for name, at in self._seen.items() if now - at > _FORGET_S]:
            del self._roles[name], self._seen[name]

    def observe(self, model: str, prefill: Side, decode: Side, idlest: Sequence[str], now: float) -> None:
        """Takes pressures of a model's instances, `idlest`, in, and lets one change sides if that is due: the first
        that can.
        """
        self._seen.update({name: now for name in idlest if name in self._roles})
        fleet = self._fleets.setdefault(model, _Fleet())
        keep = math.exp(-(now - fleet.at) / self._settings.smooth_s)
        fleet.at = now
        fleet.prefill = keep * fleet.prefill + (1 - keep) * prefill.pressure
        fleet.decode = keep * fleet.decode + (1 - keep) * decode.pressure
        if self._told is not None or now - fleet.changed < self._settings.dwell_s:
            return
        role = needed(prefill._replace(pressure=fleet.prefill), decode._replace(pressure=fleet.decode), self._settings)
        changing = next((name for name in idlest if role and self._roles.get(name, role) is not role), None)
        if role and changing:
            self._roles[changing] = role
            fleet.changed = now
