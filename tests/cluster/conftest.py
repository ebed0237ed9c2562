"""One etcd for all tests that leave it whole; a prefix of its own for each."""

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable, Iterator

import pytest

from cairn.cluster.base import Registry
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.cluster.memory import MemoryRegistry
from tests.cluster.etcd import Cluster, etcd

Body = Callable[[Registry, str], Awaitable[None]]

DEADLINE_S = 30.0

_counter = itertools.count()


@pytest.fixture(scope="session")
def one_etcd() -> Iterator[Cluster]:
    if shutil.which("etcd") is None:
        pytest.skip("no `etcd` here: apt-get install etcd-server")
    with etcd() as cluster:
        yield cluster


@pytest.fixture(params=["memory", "etcd"])
def within(request: pytest.FixtureRequest) -> Callable[[Body], None]:
    """Runs a body with a registry of either kind, and a prefix that nobody else uses."""
    prefix = f"/t{next(_counter)}/"
    endpoints = request.getfixturevalue("one_etcd").endpoints if request.param == "etcd" else ()

    def run(body: Body) -> None:
        async def main() -> None:
            registry = EtcdRegistry(EtcdSettings(endpoints=endpoints)) if endpoints else MemoryRegistry()
            async with registry, asyncio.timeout(DEADLINE_S):
                await body(registry, prefix)

        asyncio.run(main())

    return run


@pytest.fixture
def shared_etcd(one_etcd: Cluster) -> tuple[Cluster, str]:
    """The etcd, and a prefix that nobody else uses."""
    return one_etcd, f"/t{next(_counter)}/"
