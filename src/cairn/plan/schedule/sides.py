"""The sides of a disaggregated fleet: who computes a prompt, who decodes it, and who does both."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.plan.role import Role
from cairn.plan.schedule.base import Ask, InstanceView
from cairn.plan.schedule.estimate import Estimates
from cairn.plan.schedule.mix import MixRoles, MixSettings, Side

_OBSERVE_S = 1.0
"""How often MIX instances are looked at."""

_CODES = {Role.DEFAULT: 0, Role.PREFILL: 1, Role.DECODE: 2}
_DEFAULT, _PREFILL, _DECODE = _CODES.values()

Codes = npt.NDArray[np.int8]


class Split(NamedTuple):
    """Masks over instances [n]: where a request is computed and decoded, only computed, only decoded."""

    whole: npt.NDArray[np.bool_]
    prefill: npt.NDArray[np.bool_]
    decode: npt.NDArray[np.bool_]


class Sides:
    """Knows each instance's side, that of MIX ones by the pressure it sees. Not thread-safe."""

    def __init__(self, settings: MixSettings | None = None) -> None:
        self._mix = MixRoles(settings)
        self._observed = float("-inf")

    def of(self, here: Sequence[InstanceView], found: Estimates, request: Ask, now: float) -> Split | None:
        """None: all do everything. found: estimates of `request` on the instances `here`.

        A decode instance computes itself what takes no longer than the time between two tokens, as it then holds up
        its batch no longer than that. If a side has nobody, all do everything.
        """
        roles = [one.role for one in here]
        if roles.count(Role.DEFAULT) == len(roles):
            return None
        self._mix.meet([one.id for one in here if one.role is Role.MIX])
        codes = self._codes(here, roles)
        if now - self._observed >= _OBSERVE_S:
            self._observed = now
            self._observe(here, codes, found, request, now)
            codes = self._codes(here, roles)
        prefill, decode, default = codes == _PREFILL, codes == _DECODE, codes == _DEFAULT
        if not default.any() and not (prefill.any() and decode.any()):
            return None
        return Split(default | decode & (found["compute_s"] <= request.tbt_slo_s), prefill, decode)

    def _codes(self, here: Sequence[InstanceView], roles: list[Role]) -> Codes:
        mix = self._mix
        return np.array(
            [_CODES[mix[one.id] if role is Role.MIX else role] for one, role in zip(here, roles, strict=True)], np.int8
        )

    def _observe(self, here: Sequence[InstanceView], codes: Codes, found: Estimates, request: Ask, now: float) -> None:
        prefill, decode = codes == _PREFILL, codes == _DECODE
        busy = np.where(decode, np.maximum(found["tpot_s"] / request.tbt_slo_s, found["kv_share"]), 0.0)
        queued = np.where(prefill, found["queue_s"] / request.ttft_slo_s, 0.0)
        idlest = [here[i].id for i in np.argsort(busy + queued, kind="stable")]
        self._mix.observe(_side(queued, prefill), _side(busy, decode), idlest, now)


def _side(load: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_]) -> Side:
    count = int(mask.sum())
    return Side(float(load.sum()) / count if count else 0.0, count)
