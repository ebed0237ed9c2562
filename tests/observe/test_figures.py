"""Pages over HTTP: who may see them, and what a client that misbehaves can do."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from cairn.config.schema import Observe
from cairn.errors import ConfigError, InputError
from cairn.observe.http import Answer, PagesServer, json_page
from cairn.observe.layers import LayerTimes
from cairn.observe.metrics import Metrics
from tests.engine.pages import make_engine
from tests.serve.running import until


@pytest.fixture
def server() -> Iterator[PagesServer]:
    config = Observe(http_port=0, http_token="secret")  # type: ignore[arg-type]
    pages = {"/one": json_page(lambda: {"a": 1}), "/bad": json_page(lambda: object())}
    echo = {"/open": lambda query: Answer([(b"x-made-by", b"us")], query, 307)}
    with PagesServer(config, pages, echo) as server:
        yield server


def get(server: PagesServer, path: str, token: str | None = "secret") -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.get(server.url + path, headers=headers, timeout=60)


def port_of(server: PagesServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_pages_are_for_who_has_the_token(server: PagesServer) -> None:
    assert get(server, "/one").json() == {"a": 1}
    assert get(server, "/one?x=1").json() == {"a": 1}
    assert get(server, "/one", None).status_code == get(server, "/one", "guess").status_code == 401
    assert get(server, "/health", None).json() == {"status": "ok"}
    opened = get(server, "/open?a=1&b=2", None)
    assert (opened.status_code, opened.headers["x-made-by"], opened.content) == (307, "us", b"a=1&b=2")
    nowhere = get(server, "/two")
    assert (nowhere.status_code, nowhere.text) == (404, "there are /bad, /one\n")


def test_a_page_that_fails_costs_one_request(server: PagesServer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        with pytest.raises(httpx.RemoteProtocolError):
            get(server, "/bad")
    assert get(server, "/one").status_code == 200
    assert "a page could not be shown: TypeError" in caplog.text


def test_clients_that_say_nothing_are_few_and_give_way(server: PagesServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)))) for _ in range(8)]
        until(lambda: _is_full(server), "no room")
        for one in silent:
            one.close()
        until(lambda: not _is_full(server), "room again")


def _is_full(server: PagesServer) -> bool:
    try:
        return get(server, "/health").status_code != 200
    except httpx.TransportError:
        return True


def test_another_host_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="CAIRN_OBSERVE__HTTP_TOKEN"):
        PagesServer(Observe(http_host="0.0.0.0", http_port=0), {})


def test_a_port_in_use_ends_in_one_line_and_gives_everything_back(server: PagesServer) -> None:
    for _ in range(2):  # the second time nothing of the first is left
        with pytest.raises(InputError, match=f"HTTP on 127.0.0.1:{port_of(server)}: .*in use; set another"):
            make_engine(4, **{"observe.http_port": port_of(server)})


def test_times_of_layers() -> None:
    metrics = Metrics()
    times = LayerTimes(4, metrics.layerwise)
    times.copied(range(1), 0.5)
    times.copied(range(1, 4), 3.0)
    times.copied(range(1), 0.25)
    times.waited(3, 0.125)
    rows = times.stats()["layers"]
    assert [row["loads"] for row in rows] == [2, 1, 1, 1]
    assert [row["load_seconds"] for row in rows] == [0.75, 1.0, 1.0, 1.0]
    assert rows[3] == {"layer": 3, "loads": 1, "load_seconds": 1.0, "waits": 1, "wait_seconds": 0.125}
    assert metrics.layerwise.sums() == (5, 3.75)
