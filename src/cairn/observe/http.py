"""What is shown over HTTP of processes that serve nothing else there: engines and nodes. On threads of its own."""

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from socket import AF_INET6
from socketserver import ThreadingTCPServer
from typing import Any, Final, NamedTuple, Self

from cairn.config.schema import Observe
from cairn.errors import InputError
from cairn.observe.access import check_exposure, may_pass
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a GET is answered. headers: in lower case, without the body's length."""

    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    status: int = 200


#: Makes an answer of a query.
Page = Callable[[bytes], Answer]

JSON_HEADERS: Final = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
#: Of metrics in Prometheus' text format.
METRICS_HEADERS: Final = [(b"content-type", b"text/plain; version=0.0.4")]
#: Requests at a time; further ones are hung up on.
_AT_ONCE: Final = 8
#: For a client to send its request or to take the answer, seconds.
_PATIENCE_S: Final = 5.0
#: How long `close` may take to be noticed, seconds.
_LOOK_S: Final = 0.2
_PLAIN: Final = [(b"content-type", b"text/plain; charset=utf-8")]


def json_page(value: Callable[[], Any]) -> Page:
    """A page of what `value` gives."""
    return lambda _: Answer(JSON_HEADERS, json.dumps(value()).encode())


def address(host: str, port: int) -> str:
    """As URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class PagesServer:
    """Answers GET by path: `pages` to who has the token, `open_pages` and `/health` to anybody. Listens once made;
    `close`. url: where.

    Raises ConfigError for an address that others reach without a token, InputError for one that cannot be had.
    """

    def __init__(self, config: Observe, pages: Mapping[str, Page], open_pages: Mapping[str, Page] = {}) -> None:
        assert config.http_port is not None
        token = None if config.http_token is None else config.http_token.get_secret_value()
        check_exposure(config.http_host, token, "CAIRN_OBSERVE__HTTP_TOKEN")
        anybodys = {"/health": json_page(lambda: {"status": "ok"}), **open_pages}
        try:
            self._server = _Server((config.http_host, config.http_port), pages, anybodys, token)
        except OSError as error:
            where, why = address(config.http_host, config.http_port), error.strerror or error
            raise InputError(f"HTTP on {where}: {why}; set another observe.http_port, or null") from None
        self.url = f"http://{address(config.http_host, self._server.server_address[1])}"
        logger.info("HTTP at %s: %s", self.url, ", ".join(sorted(pages)))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_S,), name="cairn-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Answers under way are not waited for. Repeatable."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingTCPServer):
    """Not http.server's, which asks the DNS for the host's name at the start."""

    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(
        self, at: tuple[str, int], pages: Mapping[str, Page], anybodys: Mapping[str, Page], token: str | None
    ) -> None:
        if ":" in at[0]:
            self.address_family = AF_INET6
        self.pages, self.anybodys, self.token = pages, anybodys, token
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(at, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread can be had
                self._room.release()
                raise
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - socketserver's interface
        """A client that left, or a page that failed: the next scrape is another try."""
        error = sys.exc_info()[1]
        log_once(logger, f"page {type(error).__name__}", f"a page could not be shown: {error!r}")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers, body, status = self._page(path)(query.encode())
        self.send_response(status)
        for name, value in (*headers, (b"content-length", str(len(body)).encode())):
            self.send_header(name.decode(), value.decode())
        self.end_headers()
        self.wfile.write(body)

    def _page(self, path: str) -> Page:
        server = self.server
        if path in server.anybodys:
            return server.anybodys[path]
        if not may_pass(self.headers.get("authorization"), server.token):
            return lambda _: Answer(_PLAIN, b"a bearer token is needed\n", 401)
        if path in server.pages:
            return server.pages[path]
        there = f"there are {', '.join(sorted(server.pages))}\n"
        return lambda _: Answer(_PLAIN, there.encode(), 404)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes are no news."""
