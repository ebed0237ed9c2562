"""The gateway over HTTP: plain ASGI, as what stands between a client and its engine must cost next to nothing."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from starlette.types import Receive, Scope, Send

from cairn import __version__
from cairn.config.schema import Serve
from cairn.observe.http import JSON_HEADERS, METRICS_HEADERS
from cairn.observe.log import REQUEST_ID
from cairn.serve.base import RequestError
from cairn.serve.dashboard import STATE, Board, page_files, since_of
from cairn.serve.gateway.admin import Admin
from cairn.serve.gateway.asked import CHAT, COMPLETIONS, Asked
from cairn.serve.gateway.base import Headers
from cairn.serve.gateway.client import Client, Waits
from cairn.serve.gateway.dispatch import RefusedError
from cairn.serve.gateway.metrics import GatewayMetrics
from cairn.serve.gateway.models import Models
from cairn.serve.gateway.relay import Relay

logger = logging.getLogger(__name__)

_LEFT: Final = 499
_SHOWN: Final = frozenset({COMPLETIONS, CHAT, "/v1/models", "/health", "/health/ready", "/metrics", STATE})

Route = Callable[[Client], Awaitable[None]]


class Gateway:
    """The ASGI application. For one event loop."""

    def __init__(self, relay: Relay, admin: Admin, config: Serve, metrics: GatewayMetrics, board: Board) -> None:
        self._relay, self._members, self._config, self._metrics = relay, relay.members, config, metrics
        self._keys = [key.get_secret_value() for key in config.api_keys]
        self._admin_key = config.admin_key.get_secret_value() if config.admin_key else None
        self._models = Models(relay.members)
        self._admin = admin
        self._board = board
        self._waits = Waits.of(config.body_s, config.client_s)
        self._running = 0
        self._routes: dict[tuple[str, str], Route] = {
            ("GET", "/v1/models"): self._list_models,
            ("GET", "/health"): self._health,
            ("GET", "/health/ready"): self._ready,
            ("GET", "/metrics"): self._show_metrics,
            ("GET", STATE): self._show_state,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        client = Client(scope, receive, send, self._waits)
        path, status, begun = scope["path"], 500, time.monotonic()
        before = REQUEST_ID.set(client.id)
        try:
            if scope["method"] == "POST" and path in (COMPLETIONS, CHAT):
                await self._infer(client, path)
            else:
                await self._other(client, scope["method"], path)
            status = client.status
        except RequestError as error:
            status = error.status
            await client.refuse(str(error), status, _head_of(error))
        except asyncio.CancelledError:
            if not client.left:
                raise
            status = _LEFT
        finally:
            client.close()
            self._metrics.ended(path if path in _SHOWN else "other", status)
            if logger.isEnabledFor(logging.INFO):
                fields = {"path": path[:200], "status": status, "seconds": round(time.monotonic() - begun, 6)}
                logger.info("request: %(path)s %(status)d in %(seconds)g s", fields, extra={"fields": fields})
            REQUEST_ID.reset(before)

    async def _infer(self, client: Client, path: str) -> None:
        if self._keys:
            _check_key(client, self._keys)
        if self._running >= self._config.max_requests:
            raise RefusedError(f"{self._running} requests are being served already; try again later", 503, 1.0)
        self._running += 1
        try:
            body = await client.body(self._config.max_body)
            asked = Asked(path, body)
            client.watch()
            await self._relay.carry(asked, client)
        finally:
            self._running -= 1

    async def _other(self, client: Client, method: str, path: str) -> None:
        route = self._routes.get((method, path))
        if route is not None:
            return await route(client)
        if method == "GET" and (found := page_files().get(path)):
            return await _whole(client, found.body, found.headers, found.status)
        if path.startswith("/admin/"):
            if self._admin_key is None:
                raise RequestError("there is no admin API without serve.admin_key", 403)
            _check_key(client, [self._admin_key])
            return await _json(client, await self._admin.answer(method, path))
        if path.startswith("/v1/models/"):
            _check_key(client, self._keys)
            return await _json(client, await self._models.one(path.removeprefix("/v1/models/")))
        raise RequestError(f"{method} {path[:200]}: there is nothing like it here", 404)

    async def _list_models(self, client: Client) -> None:
        _check_key(client, self._keys)
        await _json(client, await self._models.every())

    async def _health(self, client: Client) -> None:
        await _json(client, self._state())

    async def _ready(self, client: Client) -> None:
        """503 while there is no engine that would be asked."""
        state = self._state()
        await _json(client, state, 200 if state["ready"] else 503)

    async def _show_metrics(self, client: Client) -> None:
        self._check_looker(client)
        await _whole(client, await asyncio.to_thread(self._metrics.exposition), METRICS_HEADERS)

    async def _show_state(self, client: Client) -> None:
        self._check_looker(client)
        await _whole(client, self._board.state(since_of(client.query)), JSON_HEADERS)

    def _check_looker(self, client: Client) -> None:
        _check_key(client, [self._admin_key] if self._admin_key else self._keys)

    def _state(self) -> dict[str, Any]:
        now = time.monotonic()
        every = self._members.members.values()
        ready = sum(member.ready(now) and not member.drains for member in every)
        return {"status": "ok", "ready": ready > 0, "instances": len(every), "usable": ready, "version": __version__}


def _head_of(error: RequestError) -> list[tuple[bytes, bytes]]:
    """What is refused before its body was read ends the connection: the rest of it is not waited for."""
    if isinstance(error, RefusedError):
        return [(b"retry-after", str(error.retry_after_s).encode())]
    return [(b"connection", b"close")] if error.status in (401, 403, 408, 413) else []


def _check_key(client: Client, keys: Sequence[str]) -> None:
    if not client.may_pass(keys):
        raise RequestError("a key is needed: `Authorization: Bearer KEY`", 401)


async def _json(client: Client, value: object, status: int = 200) -> None:
    await _whole(client, msgspec.json.encode(value), JSON_HEADERS, status)


async def _whole(client: Client, body: bytes, headers: Headers, status: int = 200) -> None:
    await client.start(status, [*headers, (b"content-length", str(len(body)).encode())])
    await client.send(body, more=False)
