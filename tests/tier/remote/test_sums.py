"""What the checksums of objects prove."""

from pathlib import Path

import numpy as np

from cairn.codec import Raw
from cairn.codec.frame import Framer
from cairn.observe.reasons import Reason
from cairn.tier.remote import Get, Put
from cairn.tier.remote.packing import TAIL_BYTES, Packing
from cairn.transport.moving import sums_of
from tests.tier.remote.rig import PACK, Place, loaded, opened, read, write
from tests.tier.remote.test_conformance import fresh
from tests.tier.rig import GEOMETRY, content, namespace


def test_10_000_flips_of_an_object_are_misses() -> None:
    """Every byte of blocks and tail is covered by something. (The same code proves the bytes of every store.)"""
    packing, keys = Packing(Framer(Raw(GEOMETRY)), PACK), fresh(2)
    rows = [content(key).copy() for key in keys]
    key, used = keys[1].tobytes(), TAIL_BYTES
    tail = bytearray(packing.tail(key, namespace(), rows)(sums_of(rows)))

    def proved() -> list[Reason | None]:
        expected = packing.prove_tail(memoryview(tail), key, 2)
        return [expected] * 2 if isinstance(expected, Reason) else packing.prove(rows, sums_of(rows), expected)

    assert proved() == [None, None]
    chooser = np.random.default_rng(2)
    for at, value in zip(
        np.concatenate([np.arange(used), chooser.integers(0, used, 8464 - used)]).tolist(),
        chooser.integers(1, 256, 8464).tolist(),
        strict=True,
    ):
        tail[at] ^= value
        assert proved() != [None, None], f"byte {at} of the tail ^ {value}"
        tail[at] ^= value
    for at, value in zip(
        chooser.integers(0, 4096, 1536).tolist(), chooser.integers(1, 256, 1536).tolist(), strict=True
    ):
        rows[1][at] ^= value
        assert proved() == [None, Reason.CORRUPT], f"byte {at} of a block ^ {value}"
        rows[1][at] ^= value


def test_checksums_that_nobody_made_prove_nothing() -> None:
    """Zeros stand for what is still to be summed; a tail that holds them is no proof of anything."""
    framer, key, rows = Framer(Raw(GEOMETRY)), fresh(2)[1].tobytes(), [content(key).copy() for key in fresh(2)]
    packing = Packing(framer, PACK)
    tail = memoryview(framer.pack(key, namespace(), 2 * GEOMETRY.block_bytes, bytes(32), size=4096, blocks=2))
    expected = packing.prove_tail(tail, key, 2)
    assert not isinstance(expected, Reason)
    assert packing.prove(rows, sums_of(rows), expected) == [Reason.CORRUPT] * 2
    short = memoryview(framer.pack(key, namespace(), 2 * GEOMETRY.block_bytes, bytes(16), size=4096, blocks=2))
    assert packing.prove_tail(short, key, 2) is Reason.CORRUPT


def test_a_store_that_sums_nothing_is_proved_by_the_tier(tmp_path: Path) -> None:
    keys = fresh(2 * PACK)
    with opened(Place(f"file://{tmp_path}/shared", "files")) as tier:
        store = tier._store
        get_into, put = store.get_into, store.put

        def unsummed(gets: list[Get], *, deadline: float) -> list[int | Reason]:
            return get_into([get._replace(sums=None) for get in gets], deadline=deadline)

        def plain(puts: list[Put], *, deadline: float) -> list[Reason | None]:
            return put([Put(one.name, one.parts) for one in puts], deadline=deadline)

        store.get_into, store.put = unsummed, plain  # type: ignore[method-assign]
        assert write(tier, keys) == [None] * len(keys)
        assert loaded(tier, keys) == len(keys)
        assert read(tier, keys, 1) == [None] * (len(keys) - 1)
        (path,) = (tmp_path / "shared").rglob(keys[-1].tobytes().hex())
        path.write_bytes(path.read_bytes()[:100] + b"x" + path.read_bytes()[101:])
        outcomes = read(tier, keys)
        assert outcomes == [None] * PACK + [Reason.CORRUPT] + [None] * (PACK - 1)
