"""The sides of a disaggregated fleet: who computes a prompt, who decodes it, and who does both."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.plan.role import Role
from cairn.plan.schedule.base import Ask, InstanceView
from cairn.plan.schedule.estimate import Estimates
from cairn.plan.schedule.mix import MixRoles, MixSettings, Side

_DEFAULT = Role.DEFAULT
"""At hand: to look it up at its class takes as long as to read an instance's role."""

_OBSERVE_S = 1.0
"""How often a model's MIX instances are looked at."""

Mask = npt.NDArray[np.bool_]


class Split(NamedTuple):
    """Masks over instances [n]: where a request is computed and decoded, only computed, only decoded."""

    whole: Mask
    prefill: Mask
    decode: Mask


class Sides:
    """Knows each instance's side, that of MIX ones (`mix`) by the pressure it sees. Not thread-safe."""

    def __init__(self, settings: MixSettings | None = None) -> None:
        self._settings = settings or MixSettings()
        self.mix = MixRoles(self._settings)
        self._observed: dict[str, float] = {}
        self._here: Sequence[InstanceView] = ()
        self._roles: list[Role] = []
        self._prefill = self._decode = self._default = np.zeros(0, np.bool_)

    def of(self, here: Sequence[InstanceView], found: Estimates, request: Ask, now: float) -> Split | None:
        """None: all do everything. found: estimates of `request` on the instances `here`.

        A decode instance computes itself what takes no longer than the time between two tokens, as it then holds up
        its batch no longer than that. If a side has nobody, all do everything.
        """
        for one in here:
            if one.role is not _DEFAULT:
                break
        else:
            return None
        roles = [one.role for one in here]
        if here != self._here or roles != self._roles:
            self._here, self._roles = here, roles
            self.mix.meet([one.id for one in here if one.role is Role.MIX], now)
            self._divide()
        model = here[0].model
        if now - self._observed.get(model, -math.inf) >= _OBSERVE_S:
            self._observed[model] = now
            self._observe(model, here, found, now)
            self._divide()
        if not self._default.any() and not (self._prefill.any() and self._decode.any()):
            return None
        small = found["compute_s"] <= request.tbt_slo_s
        return Split(self._default | self._decode & small, self._prefill, self._decode)

    def _divide(self) -> None:
        """Takes masks of the roles, MIX ones resolved."""
        actual = [
            self.mix.roles[one.id] if role is Role.MIX else role
            for one, role in zip(self._here, self._roles, strict=True)
        ]
        self._prefill, self._decode, self._default = (
            np.array([one is role for one in actual]) for role in (Role.PREFILL, Role.DECODE, Role.DEFAULT)
        )

    def _observe(self, model: str, here: Sequence[InstanceView], found: Estimates, now: float) -> None:
        serves = np.array([one.model == model for one in here])  # all, but for requests that anybody may serve
        prefill, decode = self._prefill & serves, self._decode & serves
        busy = np.where(decode, np.maximum(found["tpot_s"] / self._settings.tbt_slo_s, found["kv_share"]), 0.0)
        queued = np.where(prefill, found["queue_s"] / self._settings.ttft_slo_s, 0.0)
        idlest = [here[i].id for i in np.argsort(busy + queued, kind="stable") if serves[i]]
        self.mix.observe(model, _side(queued, prefill), _side(busy, decode), idlest, now)


def _side(load: npt.NDArray[np.float64], mask: Mask) -> Side:
    count = int(mask.sum())
    return Side(float(load.sum()) / count if count else 0.0, count)
