"""Who may ask a service over HTTP, see `cairn.observe.access`."""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cairn.observe.access import may_pass
from cairn.serve.refusals import refusal

REFUSED: Final = "a bearer token is needed: `Authorization: Bearer TOKEN`, the one that the service was started with"


class BearerAuth:
    """Refuses requests without the token, before their bodies are read. open_paths: what anybody may ask."""

    def __init__(self, app: ASGIApp, token: str | None, open_paths: Collection[str] = ()) -> None:
        self._app, self._token, self._open = app, token, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open:
            return await self._app(scope, receive, send)
        if may_pass(Headers(scope=scope).get("authorization"), self._token):
            return await self._app(scope, receive, send)
        answer = refusal(REFUSED, 401)
        answer.headers["www-authenticate"] = "Bearer"
        return await answer(scope, receive, send)
