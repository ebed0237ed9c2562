"""The stores, each started once for all tests of this folder. Faults are done to the same ones, and mended."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.tier.remote import open_store
from tests.tier.remote import servers
from tests.tier.remote.rig import Place, kept_open

KINDS = ("files", "valkey", "s3", "mooncake")


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Group]:
    with servers.running(servers.Group([servers.valkey(tmp_path_factory.mktemp("valkey"))])) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Group]:
    with servers.running(servers.Group([servers.weed(tmp_path_factory.mktemp("weed"))])) as server:
        servers.weed_stores(servers.s3_url(server.ports[0]))
        yield server


@pytest.fixture(scope="session")
def mooncake_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Mooncake]:
    cluster = servers.mooncake(tmp_path_factory.mktemp("mooncake"))
    with servers.running(cluster.group):
        yield cluster


@pytest.fixture(scope="session")
def mooncake_place(mooncake_cluster: servers.Mooncake) -> Iterator[Place]:
    store = open_store(mooncake_cluster.url)
    close = kept_open(store)  # which takes a second
    yield Place(mooncake_cluster.url, "mooncake", has_ttl=False, store=store)
    close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each of the stores in turn; what a test stores there others may find, so it uses names of its own."""
    if request.param == "files":
        return Place(f"file://{tmp_path}/shared", "files")
    if request.param == "mooncake":
        place: Place = request.getfixturevalue("mooncake_place")
        return place
    if request.param == "s3":
        return Place(servers.s3_url(request.getfixturevalue("s3_server").ports[0]), "s3", has_ttl=False)
    return Place(f"valkey://127.0.0.1:{request.getfixturevalue('valkey_server').ports[0]}", "valkey")
