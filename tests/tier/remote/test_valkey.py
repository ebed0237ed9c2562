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
from tests.tier.remote.rig import PACK, Place, loaded, opened, raw_get, write
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
            assert raw_get(store, b"name", 10) in (Reason.IO_ERROR, Reason.TIMEOUT, Reason.ABSENT)
            short = time.monotonic() + 1
            assert store.exists([b"name"], deadline=short) in (Reason.IO_ERROR, Reason.TIMEOUT, [False])
            assert store.put([Put(b"name", [view(b"x")])], deadline=short)[0] in (Reason.IO_ERROR, Reason.TIMEOUT)
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
