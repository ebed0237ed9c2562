"""What all replicas of the service agree on, besides who is there: the SLO, and on which side each MIX instance is."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Annotated, Final, Literal, Self

import msgspec
from msgspec import Meta

from cairn.cluster import Election, Keys, Leadership, Registry, Shared
from cairn.cluster.base import Put
from cairn.config.schema import Cluster, Slo
from cairn.errors import ClosedError, ClusterError
from cairn.observe.log import log_once
from cairn.plan.role import Role
from cairn.plan.schedule.mix import MixRoles

logger = logging.getLogger(__name__)

#: The election of the replica that decides, and the settings that all follow.
ELECTION: Final = "service"
SLO: Final = "slo"
_SIDES: Final = "sides"

#: Seconds between two looks at what is to be told, and between two attempts to lead.
_TELL_S: Final = 1.0

_Positive = Annotated[float, Meta(gt=0)]
_Sides = dict[str, Literal["PREFILL", "DECODE"]]


class SharedSlo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What clients of every replica may expect, in seconds. None: as the replica is configured."""

    ttft_s: _Positive | None = None
    tbt_s: _Positive | None = None

    def over(self, own: Slo) -> Slo:
        """A replica's own, with what is shared in its place."""
        return own.model_copy(update={key: value for key, value in msgspec.to_builtins(self).items() if value})


class Agreed:
    """Follows what is agreed on, and takes part in deciding it: `async with Agreed(...)`. For one event loop.

    One replica leads and tells the sides of MIX instances that its scheduler has found; the others take them over. When
    it dies another leads, beginning with what holds. While the registry is away nothing changes.
    """

    def __init__(
        self, registry: Registry, cluster: Cluster, name: str, mix: MixRoles | None, on_slo: Callable[[SharedSlo], None]
    ) -> None:
        """name: this replica's. mix: its scheduler's; None: that has no sides. on_slo: told of every change."""
        self._registry, self._keys = registry, Keys(cluster.namespace)
        self._mix = mix
        self._leads: Leadership | None = None
        self._election = Election(registry, self._keys.election(ELECTION), name, cluster.lease_s)
        self._slo = Shared(registry, self._keys, SLO, SharedSlo, SharedSlo(), on_slo)
        self._sides = Shared[_Sides](registry, self._keys, _SIDES, _Sides, {}, lambda _: self._follow())
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._slo)
        if self._mix is not None:
            await self._stack.enter_async_context(self._sides)
            self._follow()
            leading = asyncio.get_running_loop().create_task(self._lead(self._mix), name="cairn service election")
            self._stack.push_async_callback(asyncio.wait, [leading])
            self._stack.callback(leading.cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _follow(self) -> None:
        """Has the scheduler take over what is told, unless this replica is the one that tells."""
        if self._mix is not None:
            told = {name: Role(side) for name, side in self._sides.value.items()}
            self._mix.follow(None if self._leads else told, time.monotonic())

    async def _lead(self, mix: MixRoles) -> None:
        while not await self._sides.wait(_TELL_S):
            pass  # who leads begins with them
        while True:
            try:
                self._leads = await self._election.lead()
                self._follow()
                await self._tell(self._leads, mix)
            except ClosedError:
                return
            except ClusterError as error:
                log_once(logger, "lead", f"nobody is elected now, and the sides of MIX instances stay: {error}")
            except Exception as error:  # noqa: BLE001 - counted; or this replica would follow for ever
                self._registry.metrics.cluster_internal.add()
                log_once(logger, "lead internal", f"a bug in the leader, which resigns: {error!r}")
            finally:
                leadership, self._leads = self._leads, None
                self._follow()
                if leadership:
                    await leadership.resign()
            await asyncio.sleep(_TELL_S)

    async def _tell(self, leadership: Leadership, mix: MixRoles) -> None:
        """For as long as it leads. Raises ClusterError."""
        told: dict[str, Role] | None = None
        while leadership.held():
            sides = dict(mix.roles)
            if sides != told:
                put = Put(self._keys.setting(_SIDES), msgspec.json.encode(sides))
                outcome = await self._registry.transact([leadership.guard], [put])
                if not outcome.applied:
                    return
                told = sides
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(leadership.lapse(), _TELL_S)
