"""What the remote tests share: a tier over a store, blocks whose bytes follow from their key, and the four stores."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cairn.kv import Keys
from cairn.observe.reasons import Reason
from cairn.tier.base import Outcomes, Rows
from cairn.tier.breaker import Breaker
from cairn.tier.remote import ObjectStore, RemoteTier, open_store
from cairn.tier.remote.tier import Limits
from tests.tier.rig import GEOMETRY, content, filled, memory, namespace, soon

#: Blocks of an object here: 4 of 4 KiB.
PACK = 4
LIMITS = Limits(timeout_s=5.0, lookup_timeout_s=5.0, threads=2)


class Place(NamedTuple):
    """A store that a test may use: its URL, and what it can do. store: what `open` gives, if it takes long to open."""

    url: str
    kind: str
    has_ttl: bool = True
    store: ObjectStore | None = None

    def open(self, **settings: Any) -> ObjectStore:
        return self.store or open_store(self.url, **settings)


def kept_open(store: ObjectStore) -> Callable[[], None]:
    """Makes `close` do nothing, for a store that many tests use; returns what it did."""
    close = store.close
    store.close = lambda: None  # type: ignore[method-assign]
    return close


@contextmanager
def opened(
    place: "Place | ObjectStore",
    limits: Limits = LIMITS,
    *,
    breaker: Breaker | None = None,
    pack: int = PACK,
    **settings: Any,
) -> Iterator[RemoteTier]:
    store = place.open(**settings) if isinstance(place, Place) else place
    tier = RemoteTier(
        store, geometry=GEOMETRY, limits=limits, object_bytes=pack * GEOMETRY.block_bytes, breaker=breaker
    )
    try:
        yield tier
    finally:
        begun = time.monotonic()
        tier.close(10)
        assert time.monotonic() - begun < 15, "close took too long"


def write(tier: RemoteTier, keys: Keys, first: int = 0, *, salt: bytes = b"", timeout: float = 30.0) -> Outcomes:
    """Stores the blocks from `first` on and waits."""
    future = tier.write(keys, first, filled(keys[first:]), namespace=namespace(salt), deadline=soon(timeout))
    return future.result(timeout + 5)


def ask(tier: RemoteTier, keys: Keys, timeout: float = 10.0) -> int:
    """How many blocks the store is known to have once it has been asked."""
    answer = tier.ask(keys, deadline=soon(timeout))
    if answer is not None:
        answer.result(timeout + 5)
    return tier.match(keys)


def read(tier: RemoteTier, keys: Keys, first: int = 0, *, timeout: float = 30.0) -> Outcomes:
    """Loads the blocks from `first` on and waits; whatever is said to be loaded must be right."""
    rows = Rows(memory(len(keys) - first), np.arange(len(keys) - first, dtype=np.int32))
    outcomes = tier.read(keys, first, rows, deadline=soon(timeout)).result(timeout + 5)
    for key, row, outcome in zip(keys[first:], rows.memory, outcomes, strict=True):
        if outcome is None:
            assert np.array_equal(row[: GEOMETRY.block_bytes], content(key)), "wrong bytes were served"
    return outcomes


def loaded(tier: RemoteTier, keys: Keys) -> int:
    """Asks and loads: how many leading blocks came."""
    held = ask(tier, keys)
    outcomes = read(tier, keys[:held])
    return next((i for i, outcome in enumerate(outcomes) if outcome is not None), held)


def name_of(tier: RemoteTier, keys: Keys) -> bytes:
    """What the object is called that ends with the last of these blocks."""
    return tier._machine.packing.name(keys[-1].tobytes())


def raw_get(store: ObjectStore, name: bytes, size: int) -> bytes | Reason:
    out = bytearray(size)
    from cairn.tier.remote import Get

    (answer,) = store.get_into([Get(name, 0, [memoryview(out)], whole=True)], deadline=soon())
    return answer if isinstance(answer, Reason) else bytes(out[:answer])


Opener = Callable[[Path], Place]
