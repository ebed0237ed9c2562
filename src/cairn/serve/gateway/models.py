"""The models that the engines serve, adapters included, as they list them themselves."""

import asyncio
import time
from typing import Any, Final

import msgspec

from cairn.serve.base import RequestError
from cairn.serve.gateway.base import UpstreamError
from cairn.serve.gateway.members import Member, Members

_ASK_S: Final = 2.0
#: Seconds for which a list is good.
_FRESH_S: Final = 2.0
_ANSWER: Final = 1 << 20


class _Listing(msgspec.Struct):
    data: list[dict[str, Any]] = []


class Models:
    """Asks all engines, at most every few seconds. For one event loop."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._known: dict[str, dict[str, Any]] = {}
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def every(self) -> dict[str, Any]:
        """As OpenAI's API lists them."""
        return {"object": "list", "data": [*(await self._look()).values()]}

    async def one(self, name: str) -> dict[str, Any]:
        """Raises RequestError for one that nobody serves."""
        found = (await self._look()).get(name)
        if found is None:
            raise RequestError(f"model {name[:100]!r}: no engine serves it", 404)
        return found

    async def _look(self) -> dict[str, dict[str, Any]]:
        async with self._lock:
            if time.monotonic() >= self._until:
                lists = await asyncio.gather(*map(_models_of, self._members.members.values()))
                self._known = {model["id"]: model for models in lists for model in models}
                self._until = time.monotonic() + _FRESH_S
            return self._known


async def _models_of(member: Member) -> list[dict[str, Any]]:
    """None of an engine that does not answer."""
    try:
        async with asyncio.timeout(_ASK_S):
            answer = await member.pool.get(b"/v1/models", _ASK_S)
            told = bytearray()
            try:
                while len(told) <= _ANSWER and (data := await answer.read(_ASK_S)):
                    told += data
            finally:
                answer.close()
            listed = msgspec.json.decode(bytes(told), type=_Listing).data
            return [model for model in listed if isinstance(model.get("id"), str)]
    except (UpstreamError, TimeoutError, ValueError, RecursionError):
        return []
