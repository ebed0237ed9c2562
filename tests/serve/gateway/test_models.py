"""What engines list of their models, of which some may say anything."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.serve.gateway.models import Models


def engine(told: bytes) -> Any:
    """One that lists this."""

    async def get(*_: object) -> Any:
        pieces = [told, b""]

        async def read(_: float) -> bytes:
            return pieces.pop(0)

        return SimpleNamespace(read=read, close=lambda: None)

    return SimpleNamespace(pool=SimpleNamespace(get=get))


@pytest.mark.parametrize(
    "odd", [b'{"data": [{"id": ["x"]}]}', b'{"data": [{}]}', b'{"data": ' + b"[" * 100_000, b"\xff", b""]
)
def test_one_engines_odd_list_hides_no_other_model(odd: bytes) -> None:
    engines = {"a": engine(odd), "b": engine(b'{"data": [{"id": "m"}]}')}
    listed = asyncio.run(Models(SimpleNamespace(members=engines)).every())  # type: ignore[arg-type]
    assert listed["data"] == [{"id": "m"}]
