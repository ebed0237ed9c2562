"""What only Valkey has: passwords, clusters, and a peer that talks nonsense."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import valkey

from cairn.observe.reasons import Reason
from cairn.tier.remote import Get, Put, open_store
from tests.ports import free_ports
from tests.tier.remote import servers
from tests.tier.remote.rig import PACK, Place, loaded, name_of, opened, raw_get, read, write
from tests.tier.remote.test_conformance import fresh, view
from tests.tier.rig import soon


def test_passwords(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = servers.valkey(tmp_path, "--requirepass", "let-me-in")
    with servers.running(server):
        port = server.ports[0]
        for user, word, reason in (
            ("", "let-me-in", None),
            ("default", "let-me-in", None),
            ("", "wrong-one", Reason.IO_ERROR),
        ):
            store = open_store(f"valkey://{user}:{word}@127.0.0.1:{port}/2")
            try:
                assert store.health(deadline=soon()) is reason
            finally:
                store.close()
        store = open_store(f"valkey://127.0.0.1:{port}")
        try:
            assert store.exists([b"a"], deadline=soon()) is Reason.IO_ERROR
            assert store.put([Put(b"a", [view(b"x")])], deadline=soon()) == [Reason.IO_ERROR]
        finally:
            store.close()
    assert "let-me-in" not in caplog.text
    assert "wrong-one" not in caplog.text


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[servers.Server]]:
    homes = [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
    pairs = [free_ports(2) for _ in homes]
    nodes = [
        servers.valkey(home, "--cluster-enabled", "yes", "--cluster-port", str(bus), port=port)
        for home, (port, bus) in zip(homes, pairs, strict=True)
    ]
    with servers.running(nodes[0]), servers.running(nodes[1]):
        one, two = (valkey.Valkey(port=port) for port, _ in pairs)
        one.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        two.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
        one.execute_command("CLUSTER", "MEET", "127.0.0.1", pairs[1][0], pairs[1][1])

        def ready() -> bool:
            return all("cluster_state:ok" in str(c.execute_command("CLUSTER", "INFO")) for c in (one, two)) and all(
                len(c.execute_command("CLUSTER", "SLOTS")) == 2 for c in (one, two)
            )

        servers.until(ready, "the cluster is one")
        yield nodes
        one.close()
        two.close()


def test_a_cluster(cluster: list[servers.Server]) -> None:
    place = Place(f"valkey://127.0.0.1:{cluster[0].ports[0]}?cluster=true", "valkey")
    keys = fresh(20 * PACK)
    with opened(place) as tier:
        assert set(write(tier, keys)) == {None}
    for node in cluster:
        with valkey.Valkey(port=node.ports[0]) as client:
            assert client.dbsize() > 0, "both have some"
    with opened(place) as tier:
        assert loaded(tier, keys) == len(keys)
        assert tier.stats()["round_trips_total"] == 1
        assert tier.stats()["connects_total"] >= 2
        # Slots move: what is asked where it is no longer is an error once, and then found.
        one, two = (valkey.Valkey(port=node.ports[0]) for node in cluster)
        servers_map = tier._store._servers  # type: ignore[attr-defined]
        servers_map._slots = [("127.0.0.1", cluster[1].ports[0])] * 16384
        assert tier._store.exists([b"a", b"b", b"c", b"d", b"e", b"f"], deadline=soon()) is Reason.IO_ERROR
        assert tier._store.exists([b"a", b"b", b"c", b"d", b"e", b"f"], deadline=soon()) == [False] * 6
        one.close()
        two.close()


@pytest.mark.parametrize("endpoint", ["unknown-endpoint", "hostname"])
def test_a_cluster_that_does_not_name_its_hosts(endpoint: str, tmp_path: Path) -> None:
    """They are reached as the one was that told."""
    port, bus = free_ports(2)
    options = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-preferred-endpoint-type", endpoint)
    with servers.running(servers.valkey(tmp_path, *options, port=port)), valkey.Valkey(port=port) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        store = open_store(f"valkey://127.0.0.1:{port}?cluster=true")
        servers.until(lambda: store.exists([b"a"], deadline=soon()) == [False], "the cluster answers")
        store.close()


@pytest.mark.parametrize("foreign", ["a list", "far too long"])
def test_what_others_have_put_under_our_name_goes_and_the_store_is_not_to_blame(foreign: str, tmp_path: Path) -> None:
    """It would open the breaker, each time that somebody asks for this one prompt, for all."""
    keys, server = fresh(PACK), servers.valkey(tmp_path)
    place = Place(f"valkey://127.0.0.1:{server.ports[0]}", "valkey")
    with servers.running(server), valkey.Valkey(port=server.ports[0]) as client, opened(place) as tier:
        assert set(write(tier, keys)) == {None}
        name = name_of(tier, keys)
        client.delete(name)
        if foreign == "a list":
            client.rpush(name, b"x")
        else:
            client.set(name, bytes(80 << 20))
        assert set(read(tier, keys)) <= {Reason.FOREIGN, Reason.CORRUPT}
        assert not client.exists(name)
        assert tier.stats()["io_error_total"] == 0
        assert set(write(tier, keys)) == {None}
        assert loaded(tier, keys) == PACK


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_name_that_no_host_can_have_is_an_error_like_others(host: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(f"valkey://{host}:1")
    try:
        assert store.exists([b"a"], deadline=soon()) is Reason.IO_ERROR
        assert [record.getMessage().count("is no name of a host") for record in caplog.records] == [1]
    finally:
        store.close()


def test_all_addresses_of_a_name_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not answer leave time for one that does; if none does, all together take no longer."""
    with silent("127.0.0.2") as one, silent("127.0.0.3") as two, peer(b":1\r\n") as port:
        places = [one, two]
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", at) for at in places]
        )
        store = open_store("valkey://many:1")
        try:
            begun = time.monotonic()
            assert store.exists([b"a"], deadline=begun + 1) is Reason.TIMEOUT
            assert time.monotonic() - begun < 1.5
            places.append(("127.0.0.1", port))
            assert store.exists([b"a"], deadline=soon(1.5)) == [True]
        finally:
            store.close()


@contextlib.contextmanager
def silent(host: str) -> Iterator[tuple[str, int]]:
    """An address where nobody takes connections any more: those that wait already are as many as may."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$5\r\nab",
        b"$999999999999\r\n",
        b"$-1\r\n",
        b"*1\r\n$1\r\na\r\n",
        b":5\r\n",
        b"$abc\r\n",
        b"$--5\r\n",
        b":" + b"1" * 5_000 + b"\r\n",
        b"*99999999\r\n",
        b"-WRONGTYPE Operation against a key\r\n",
        b"+" + b"x" * 100_000,
        b"*1\r\n" * 50_000,
    ],
)
def test_a_peer_that_talks_nonsense(answer: bytes) -> None:
    """Nothing raises, nothing hangs, no memory is taken on its word, and the next connection starts anew."""
    with peer(answer) as port:
        store = open_store(f"valkey://127.0.0.1:{port}")
        try:
            begun = time.monotonic()
            refusals = (Reason.IO_ERROR, Reason.TIMEOUT, Reason.ABSENT, Reason.FOREIGN)
            assert raw_get(store, b"name", 10) in refusals
            short = time.monotonic() + 1
            assert store.exists([b"name"], deadline=short) in (*refusals, [False])
            assert store.put([Put(b"name", [view(b"x")])], deadline=short)[0] in refusals
            (got,) = store.get_into([Get(b"name", 3, [view(bytes(4))])], deadline=short)
            assert isinstance(got, Reason)
            assert time.monotonic() - begun < 5
        finally:
            store.close()


@contextlib.contextmanager
def peer(answer: bytes) -> Iterator[int]:
    """Answers whatever it is asked with the same bytes, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
