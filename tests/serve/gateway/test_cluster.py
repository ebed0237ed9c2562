"""Two replicas of the service on a real etcd, which dies and comes back while they serve."""

import asyncio
import json
import os
import secrets
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack

import httpx
import pytest

from cairn.cluster import Directory, Election, Instance, Keys, Registration, Replicas, Role, put_setting
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.serve.gateway.agreed import ELECTION, SLO, SharedSlo
from tests.cluster.etcd import etcd, needs_etcd
from tests.serve.gateway.running import Engine, Gateway
from tests.serve.running import DEADLINE_S, until

LEASE_S = 2.0
BODY = json.dumps({"model": "m", "prompt": "x", "max_tokens": 3})


def served(gateway: Gateway) -> bool:
    return httpx.post(f"http://{gateway.at}/v1/completions", content=BODY, timeout=DEADLINE_S).status_code == 200


@needs_etcd
def test_serving_goes_on_without_etcd_and_without_a_replica() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(etcd())
        engines = [stack.enter_context(Engine(model="m")) for _ in range(2)]
        options = ["--etcd-addr", ",".join(cluster.endpoints), "--set", f"cluster.lease_s={LEASE_S}"]
        options += ["--set", "cluster.timeout_s=1"]
        first, second = (
            stack.enter_context(Gateway(*options, CAIRN_SERVE__ADMIN_KEY="boss", CAIRN_SERVE__NAME=name))
            for name in ("one", "two")
        )

        async def scenario() -> None:
            async with (
                asyncio.timeout(180),
                EtcdRegistry(EtcdSettings(endpoints=cluster.endpoints)) as registry,
                Registration(registry, Keys().instance("a"), instance("a", engines[0]), LEASE_S),
                Registration(registry, Keys().instance("b"), instance("b", engines[1]), LEASE_S),
                Replicas(registry, Keys()) as replicas,
                Directory(registry, Keys()) as directory,
            ):
                for gateway in (first, second):
                    await asyncio.to_thread(gateway.wait_for, "a", "b")
                    assert await asyncio.to_thread(served, gateway)
                await asyncio.to_thread(until, lambda: {*replicas.replicas} == {"one", "two"}, "both replicas")

                cluster.members[0].kill()
                begun = asyncio.get_running_loop().time()
                while asyncio.get_running_loop().time() - begun < 1.5 * LEASE_S:
                    assert await asyncio.to_thread(served, first)
                    assert await asyncio.to_thread(served, second)
                engines[0].kill()  # nobody can tell that it is gone but those who ask it
                for _ in range(4):
                    assert await asyncio.to_thread(served, second)

                first.kill()
                assert await asyncio.to_thread(served, second)
                cluster.members[0].start()
                await asyncio.to_thread(until, lambda: {*replicas.replicas} == {"two"}, "one replica left")
                assert {"b"} <= {*directory.members}
                assert await asyncio.to_thread(served, second)

        asyncio.run(scenario())
        assert second.end() == 0


@needs_etcd
@pytest.mark.parametrize("away_s", [3 * LEASE_S, *map(float, os.environ.get("CAIRN_TEST_ETCD_AWAY_S", "").split())])
def test_a_registry_that_is_away_for_longer_than_its_leases_is_not_missed(away_s: float) -> None:
    """All members stop, so that leases run out as they return. CAIRN_TEST_ETCD_AWAY_S=60: for so long, too."""
    with ExitStack() as stack:
        cluster = stack.enter_context(etcd(3))
        engines = [stack.enter_context(Engine(model="m")) for _ in range(3)]
        options = ["--etcd-addr", ",".join(cluster.endpoints), "--set", f"cluster.lease_s={LEASE_S}"]
        gateway = stack.enter_context(Gateway(*options, "--set", "cluster.timeout_s=1", CAIRN_SERVE__ADMIN_KEY="boss"))

        async def serves(seconds: float) -> None:
            begun = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - begun < seconds:
                assert await asyncio.to_thread(served, gateway)

        async def scenario() -> None:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(asyncio.timeout(away_s + 120))
                settings = EtcdSettings(endpoints=cluster.endpoints, timeout_s=1)
                registry = await stack.enter_async_context(EtcdRegistry(settings))

                async def register(name: str, engine: Engine) -> None:
                    await stack.enter_async_context(
                        Registration(registry, Keys().instance(name), instance(name, engine), LEASE_S)
                    )

                await register("a", engines[0])
                await register("b", engines[1])
                await asyncio.to_thread(gateway.wait_for, "a", "b")
                for member in cluster.members:
                    member.freeze()
                engines[0].kill()
                await serves(away_s)
                for member in cluster.members:
                    member.signal(signal.SIGCONT)
                await serves(1.5 * LEASE_S)
                await register("c", engines[2])
                await asyncio.to_thread(gateway.wait_for, "b", "c")
                directory = await stack.enter_async_context(Directory(registry, Keys()))
                await asyncio.to_thread(until, lambda: {"b", "c"} <= {*directory.members}, "all that live")
                await serves(0.5)

        asyncio.run(scenario())
        assert gateway.end() == 0


@needs_etcd
def test_replicas_agree_on_what_drains_on_the_slo_and_on_the_sides_of_mix_instances() -> None:
    with ExitStack() as stack:
        cluster = stack.enter_context(etcd())
        engines = {name: stack.enter_context(Engine(model="m")) for name in "ab"}
        options = ["--etcd-addr", ",".join(cluster.endpoints), "--set", f"cluster.lease_s={LEASE_S}"]
        gateways = {
            name: stack.enter_context(Gateway(*options, CAIRN_SERVE__ADMIN_KEY="boss", CAIRN_SERVE__NAME=name))
            for name in ("one", "two")
        }

        def post(gateway: Gateway, path: str) -> httpx.Response:
            return gateway.client.post(path, headers={"authorization": "Bearer boss"})

        def draining(gateway: Gateway, name: str) -> bool:
            return bool(gateway.admin()[name]["draining"])

        async def scenario() -> None:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(asyncio.timeout(180))
                settings = EtcdSettings(endpoints=cluster.endpoints)
                registry = await stack.enter_async_context(EtcdRegistry(settings))
                for name, engine in engines.items():
                    here = instance(name, engine, Role.MIX)
                    await stack.enter_async_context(Registration(registry, Keys().instance(name), here, LEASE_S))
                for gateway in gateways.values():
                    await asyncio.to_thread(gateway.wait_for, *engines)
                one, two = gateways.values()

                # What one is told to drain the other drains, too.
                assert (await asyncio.to_thread(post, one, "/admin/instances/a/drain")).json()["draining"]
                await asyncio.to_thread(until, lambda: draining(two, "a"), "the other drains it")
                assert not (await asyncio.to_thread(post, two, "/admin/instances/a/undrain")).json()["draining"]
                await asyncio.to_thread(until, lambda: not draining(one, "a"), "the first drains it no more")
                assert (await asyncio.to_thread(post, one, "/admin/instances/x/drain")).status_code == 404

                # Sides are told by the leader, and taken over by the other; by a new leader, too.
                election = Election(registry, Keys().election(ELECTION), "", LEASE_S)
                leader = await election.leader()
                assert leader in gateways
                for gateway in gateways.values():
                    assert await asyncio.to_thread(served, gateway)
                sides = await told(registry, lambda sides: {*sides} == {*engines})
                assert sorted(sides.values()) == ["DECODE", "PREFILL"]
                gateways.pop(leader).kill()
                (left,) = gateways.values()
                other = next(name for name, side in sides.items() if side == "PREFILL")
                await put_setting(registry, Keys(), "sides", sides | {other: "DECODE"})  # before it leads
                while await election.leader() != next(iter(gateways)):
                    await asyncio.sleep(0.05)
                assert await asyncio.to_thread(served, left)
                assert (await told(registry, lambda sides: len(sides) == 2))[other] == "DECODE", "it began anew"

                # The SLO is everybody's from now on; one that no reader takes is left out.
                await put_setting(registry, Keys(), SLO, {"ttft_s": 1e-9})
                await asyncio.to_thread(until, lambda: not served(left), "the SLO that nobody can meet")
                await put_setting(registry, Keys(), SLO, {"ttft_s": -1})
                await put_setting(registry, Keys(), SLO, SharedSlo(ttft_s=5))
                await asyncio.to_thread(until, lambda: served(left), "the SLO that anybody can meet")
                cluster.members[0].kill()
                refused = await asyncio.to_thread(post, left, "/admin/instances/a/drain")
                assert refused.status_code == 503, refused.text
                assert "nothing is changed" in refused.text
                assert await asyncio.to_thread(served, left)

        asyncio.run(scenario())
        assert next(iter(gateways.values())).end() == 0


async def told(registry: EtcdRegistry, enough: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    """The sides that the leader tells, once they are that."""
    while True:
        entry = await registry.get(Keys().setting("sides"))
        sides: dict[str, str] = json.loads(entry.value) if entry else {}
        if enough(sides):
            return sides
        await asyncio.sleep(0.05)


def instance(name: str, engine: Engine, role: Role = Role.DEFAULT) -> Instance:
    return Instance(name=name, incarnation=secrets.token_hex(8), http=engine.url, model="m", role=role)
