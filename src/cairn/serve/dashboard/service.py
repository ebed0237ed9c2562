"""The dashboard of a process that serves nothing else over HTTP, on a thread of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cairn.observe.access import check_exposure
from cairn.serve.auth import BearerAuth
from cairn.serve.dashboard.base import Source
from cairn.serve.dashboard.board import Board
from cairn.serve.dashboard.pages import STATE, page, paths, since_of
from cairn.serve.process import Server, address, listen, settings

_END_S: Final = 2.0


class Dashboard:
    """An ASGI application: the page's files, and what they draw."""

    def __init__(self, board: Board) -> None:
        self._board = board

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await self._answer(scope["method"], scope["path"], scope["query_string"])(scope, receive, send)

    def _answer(self, method: str, path: str, query: bytes) -> Response:
        if method == "GET" and path == STATE:
            state = self._board.state(since_of(query))
            return Response(state, headers={"cache-control": "no-store"}, media_type="application/json")
        if method == "GET" and (found := page(path)):
            return Response(found.body, found.status, {name.decode(): value.decode() for name, value in found.headers})
        return Response(status_code=404)


@contextmanager
def dashboard(source: Source, host: str, port: int, token: str | None, given: str) -> Iterator[str]:
    """Serves it meanwhile; its URL. token: for all but the page's files. given: how the token is told.

    Raises ConfigError for an address that others reach without a token, InputError for one that cannot be had.
    """
    check_exposure(host, token, given)
    with listen(host, port) as listening, asyncio.Runner() as runner:
        board = Board(source)
        http = Server(settings(BearerAuth(Dashboard(board), token, paths()), _END_S))

        async def serve() -> None:
            async with board:
                await http.serve([listening])

        thread = threading.Thread(target=runner.run, args=(serve(),), name="cairn-dashboard", daemon=True)
        thread.start()
        try:
            yield f"http://{address(host, listening.getsockname()[1])}/dashboard/"
        finally:
            http.should_exit = True
            thread.join(2 * _END_S)
