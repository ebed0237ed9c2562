"""Engines that are named in the configuration instead of registering themselves."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from cairn.cluster import Events, Instance, Keys, Registry, Role
from cairn.cluster.http import parse_url
from cairn.cluster.registrar import Registrar, rank_endpoints
from cairn.errors import InputError

#: For engines to be found at the start, seconds.
_FIRST_LOOK_S: Final = 1.0
_OPTIONS: Final = ("role", "model", "events", "replay", "ranks")


def parse_backend(text: str) -> Instance:
    """`URL`, or `NAME=URL` with options behind commas. Raises InputError."""
    head, *more = text.split(",")
    name, _, url = head.rpartition("=")
    parts = parse_url(url)
    options = {key: value for key, _, value in (part.partition("=") for part in more)}
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(f"backend {text[:200]!r}: {unknown[0]} is no option; those are {', '.join(_OPTIONS)}")
    role, ranks = options.get("role", Role.DEFAULT).upper(), options.get("ranks", "1")
    if role not in list(Role):
        raise InputError(f"backend {text[:200]!r}: {role} is no role; must be one of {', '.join(Role)}")
    if not ranks.isdigit() or not 1 <= int(ranks) <= 1024:
        raise InputError(f"backend {text[:200]!r}: ranks must be 1 to 1024")
    endpoints = rank_endpoints(options["events"], int(ranks)) if "events" in options else []
    replays = rank_endpoints(options["replay"], int(ranks)) if "replay" in options else [None] * len(endpoints)
    return Instance(
        name=name or parts.netloc,
        incarnation=secrets.token_hex(8),
        http=url,
        role=Role(role),
        model=options.get("model", ""),
        events=tuple(Events(endpoint=one, replay=replays[i], rank=i) for i, one in enumerate(endpoints)),
    )


def parse_backends(texts: Sequence[str]) -> list[Instance]:
    """All of them. Raises InputError, too where two would have one name: the later would take the earlier's place."""
    found: dict[str, Instance] = {}
    for one in map(parse_backend, texts):
        other = found.setdefault(one.name, one)
        if other is not one:
            raise InputError(f"backends {other.http} and {one.http}: both are called {one.name}; NAME=URL names one")
    return list(found.values())


@asynccontextmanager
async def registered(
    registry: Registry, keys: Keys, instances: Sequence[Instance], lease_s: float, look_s: float, token: str | None
) -> AsyncIterator[None]:
    """Keeps them registered while they answer, as `cairn register` would. token: their API key. look_s: between two
    looks. Those that answer soon are registered when it begins.
    """
    tasks, looks = list[asyncio.Task[None]](), [asyncio.Event() for _ in instances]
    for one, look in zip(instances, looks, strict=True):
        told = partial(_tell, look)
        registrar = Registrar(registry, keys, one, lease_s=lease_s, period_s=look_s, token=token, on_change=told)
        tasks.append(asyncio.create_task(registrar.run()))
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_S):
                await asyncio.gather(*(look.wait() for look in looks))
        yield
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _tell(look: asyncio.Event, _: Instance | None) -> None:
    look.set()
