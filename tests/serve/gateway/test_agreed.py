"""The replica that decides the sides of MIX instances: what it begins with, and what its failures cost."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from cairn.cluster import Keys, Registry, put_setting
from cairn.cluster.base import Check, Outcome
from cairn.config.schema import Cluster
from cairn.plan.role import Role
from cairn.plan.schedule.mix import MixRoles
from cairn.serve.gateway.agreed import Agreed
from tests.cluster.conftest import one_etcd, within  # noqa: F401 - fixtures
from tests.cluster.test_instances import Within, until


def deciding(registry: Registry, prefix: str, mix: MixRoles) -> Agreed:
    return Agreed(registry, Cluster(namespace=prefix.strip("/"), lease_s=2.0), "one", mix, lambda _: None)


async def told(registry: Registry, prefix: str) -> dict[str, str] | None:
    entry = await registry.get(Keys(prefix.strip("/")).setting("sides"))
    return msgspec.json.decode(entry.value, type=dict[str, str]) if entry else None


def test_a_replica_that_has_met_nobody_yet_leaves_everybody_on_their_sides(within: Within) -> None:  # noqa: F811
    async def body(registry: Registry, prefix: str) -> None:
        sides = {"a": Role.PREFILL, "b": Role.PREFILL, "c": Role.DECODE}
        await put_setting(registry, Keys(prefix.strip("/")), "sides", sides)
        mix = MixRoles()
        async with deciding(registry, prefix, mix):
            await until(lambda: mix.roles == sides, "it leads")
            mix.meet(["a", "d"], asyncio.get_running_loop().time())
            while (now := await told(registry, prefix)) is None or "d" not in now:
                await asyncio.sleep(0.01)
            assert now == sides | {"d": mix.roles["d"]}

    within(body)


def test_a_bug_does_not_end_the_leading(within: Within, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    async def body(registry: Registry, prefix: str) -> None:
        whole, failures = registry.transact, [RuntimeError("a bug")]

        async def transact(checks: Sequence[Check], operations: Sequence[Any]) -> Outcome:
            if operations[0].key.endswith("sides") and failures:
                raise failures.pop()
            return await whole(checks, operations)

        monkeypatch.setattr(registry, "transact", transact)
        mix = MixRoles()
        mix.meet(["a"], 0.0)
        async with deciding(registry, prefix, mix):
            while await told(registry, prefix) is None:
                await asyncio.sleep(0.01)
        assert registry.metrics.cluster_internal.value() == 1

    within(body)
