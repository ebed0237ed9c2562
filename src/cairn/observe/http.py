"""Figures over HTTP, for processes that serve nothing else: engines and nodes. On threads of its own."""

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socket import AF_INET6
from socketserver import ThreadingTCPServer
from typing import Any, Final, Self

from cairn.config.schema import Observe
from cairn.errors import InputError
from cairn.observe.access import check_exposure, may_pass
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: The type and the bytes of an answer.
Page = Callable[[], tuple[str, bytes]]

#: Requests at a time; further ones are hung up on.
_AT_ONCE: Final = 8
#: For a client to send its request or to take the answer, seconds.
_PATIENCE_S: Final = 5.0
#: How long `close` may take to be noticed, seconds.
_LOOK_S: Final = 0.2


def json_page(value: Callable[[], Any]) -> Page:
    """A page of what `value` gives."""
    return lambda: ("application/json", json.dumps(value()).encode())


class FiguresServer:
    """Answers GET for each of `pages`, by path, and for `/health`, to who has the token. Listens once made; `close`.

    Raises ConfigError for an address that others reach without a token, InputError for one that cannot be had.
    """

    def __init__(self, config: Observe, pages: Mapping[str, Page]) -> None:
        assert config.metrics_port is not None
        token = None if config.metrics_token is None else config.metrics_token.get_secret_value()
        check_exposure(config.metrics_host, token, "CAIRN_OBSERVE__METRICS_TOKEN")
        where = f"{config.metrics_host}:{config.metrics_port}"
        try:
            self._server = _Server((config.metrics_host, config.metrics_port), pages, token)
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"figures on {where}: {why}; set another observe.metrics_port, or null") from None
        self.port: int = self._server.server_address[1]
        logger.info("figures at http://%s:%d/metrics", config.metrics_host, self.port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_S,), name="cairn-figures", daemon=True
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

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Page], token: str | None) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        self.pages, self.token = pages, token
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
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
        log_once(logger, f"figures {type(error).__name__}", f"figures could not be shown: {error!r}")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._answer(200, "application/json", b'{"status": "ok"}')
        elif not may_pass(self.headers.get("authorization"), self.server.token):
            self._answer(401, "text/plain", b"a bearer token is needed\n")
        elif path in self.server.pages:
            self._answer(200, *self.server.pages[path]())
        else:
            self._answer(404, "text/plain", f"there are {', '.join(sorted(self.server.pages))}\n".encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes are no news."""
