"""Compressed objects: what comes back, who reads whose, and that nothing but a whole object of this name is taken."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.codec.choice import codec_for, reader_for
from cairn.codec.ladder import Ladder, Rung, ladder_for
from cairn.codec.raw import Raw
from cairn.config.autopilot import Pin
from cairn.config.schema import Compression
from cairn.errors import GeometryError
from cairn.kv import KVGeometry
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.plan import Why
from cairn.tier.base import Rows
from cairn.tier.remote import RemoteTier, open_store
from cairn.tier.remote.streams import Streams
from tests.codec import samples
from tests.tier.remote.rig import LIMITS, ask
from tests.tier.rig import memory, namespace, prompt, soon

#: 4 KiB a block, as the rig's.
GEOMETRY = KVGeometry(layers=2, kv_heads=2, head_dim=32, dtype="bfloat16", block_tokens=8)
BLOCKS = 4
LOSSY: list[dict[str, Any]] = [
    {"algorithm": "cachegen", "quality": "near-lossless"},
    {"algorithm": "cachegen", "quality": "small"},
    {"algorithm": "int", "quantization_bits": 4},
    {"algorithm": "fp8"},
]
EXACT: list[dict[str, Any]] = [{"algorithm": "lossless"}, {"algorithm": "packed"}]


def ladder(settings: dict[str, Any]) -> Ladder:
    found = ladder_for(GEOMETRY, Compression(**settings), "always")
    assert found
    return found


def streams(settings: dict[str, Any], metrics: Metrics | None = None) -> Streams:
    return Streams(ladder(settings), metrics or Metrics())


def blocks(count: int = BLOCKS, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Rows of a page, uint8 [count, 4096]."""
    rows = memory(count)
    rows[:] = samples.to_rows(samples.values(GEOMETRY, count, seed), GEOMETRY.dtype)
    return rows


def stored(made: Streams, rows: npt.NDArray[np.uint8], ids: list[int] | None = None) -> npt.NDArray[np.uint8]:
    keys = prompt(1, len(rows) if ids is None else len(ids))
    places = np.arange(len(rows), dtype=np.int32) if ids is None else np.array(ids, np.int32)
    parts = made.encode(keys, namespace(), Rows(rows, places), begins=True)
    return np.frombuffer(b"".join(parts), np.uint8).copy()


def key(count: int = BLOCKS) -> bytes:
    return prompt(1, count)[-1].tobytes()


def decoded(made: Streams, object_: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | Reason:
    rows = memory(BLOCKS)
    reason = made.decode(object_, key(), BLOCKS, range(BLOCKS), Rows(rows, np.arange(BLOCKS, dtype=np.int32)))
    return rows if reason is None else reason


@pytest.mark.parametrize("settings", EXACT)
def test_without_loss_every_bit_comes_back(settings: dict[str, Any]) -> None:
    made, rows = streams(settings), blocks()
    object_ = stored(made, rows)
    assert len(object_) < 4096 + 0.9 * rows.size
    assert np.array_equal(decoded(made, object_), rows)


@pytest.mark.parametrize("settings", LOSSY)
def test_any_reader_of_a_family_gets_what_the_writer_meant(settings: dict[str, Any]) -> None:
    rows = blocks()
    object_ = stored(streams(settings), rows)
    codec = codec_for(GEOMETRY, **settings)
    meant = samples.back(codec, codec.encode(rows, sinks=8), BLOCKS)
    assert not np.array_equal(meant, rows)
    for other in LOSSY:
        assert np.array_equal(decoded(streams(other), object_), meant)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.data())
def test_any_part_goes_to_any_rows(order: list[int], count: int, data: st.DataObject) -> None:
    """Rows that are neighbours are decoded in place, others through a copy: the same either way."""
    made, rows = streams(EXACT[0]), blocks(8)
    object_ = stored(made, rows, order[:count])
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    ids = data.draw(st.permutations(range(8)))[: stop - start]
    if data.draw(st.booleans()):
        ids = list(range(stop - start))
    target = memory(8)
    target[:] = 0xA5
    wanted = Rows(target, np.array(ids, np.int32))
    assert made.decode(object_, key(count), count, range(start, stop), wanted) is None
    for row, source in zip(ids, order[start:stop], strict=True):
        assert np.array_equal(target[row], rows[source])
    assert (np.delete(target, ids, axis=0) == 0xA5).all()


def test_what_does_not_get_smaller_is_stored_as_it_is() -> None:
    noise = memory(BLOCKS)
    noise[:] = np.random.default_rng(1).integers(0, 256, noise.shape, np.uint8)
    metrics = Metrics()
    made = streams({"algorithm": "lossless"}, metrics)
    object_ = stored(made, noise)
    assert len(object_) == made.object_limit(BLOCKS)
    assert np.array_equal(decoded(made, object_), noise)
    assert metrics.compression.value(tier="remote") == 1.0


@pytest.mark.parametrize("settings", [EXACT[0], LOSSY[0]])
def test_damage_is_a_miss(settings: dict[str, Any]) -> None:
    made, rows, rng = streams(settings), blocks(), np.random.default_rng(2)
    object_ = stored(made, rows)
    used = 4096 - np.flatnonzero(object_[:4096][::-1])[0]
    for at in [*range(used), *rng.integers(4096, len(object_), 500).tolist()]:
        object_[at] ^= (change := 1 << int(rng.integers(8)))
        assert decoded(made, object_) in (Reason.CORRUPT, Reason.FOREIGN), f"byte {at} ^ {change}"
        object_[at] ^= change
    for size in (0, 1, 23, 4095, 4096, len(object_) - 1):
        assert decoded(made, object_[:size]) is Reason.CORRUPT
    assert decoded(made, np.concatenate([object_, object_[:4]])) is Reason.CORRUPT
    assert made.decode(object_, key(3), BLOCKS, range(1), Rows(memory(1), np.zeros(1, np.int32))) is Reason.FOREIGN
    assert made.decode(object_, key(), 3, range(1), Rows(memory(1), np.zeros(1, np.int32))) is Reason.CORRUPT


def test_a_codec_that_nobody_knows_is_foreign() -> None:
    class Newer(type(codec_for(GEOMETRY, "lossless"))):  # type: ignore[misc]
        id = "newer"

    assert reader_for(GEOMETRY, "newer") is None
    object_ = stored(Streams(Ladder([Newer(GEOMETRY)]), Metrics()), blocks())
    assert decoded(streams(EXACT[0]), object_) is Reason.FOREIGN


@pytest.mark.parametrize("settings", LOSSY)
def test_what_has_lost_something_is_foreign_where_nothing_may(settings: dict[str, Any]) -> None:
    """Also where somebody has stored it under a name of the family without loss."""
    assert decoded(streams(EXACT[0]), stored(streams(settings), blocks())) is Reason.FOREIGN


def test_a_device_that_is_not_there_keeps_nobody_from_reading() -> None:
    """`int` needs none, so nothing has missed it so far; `cachegen`, of the same family, asks for it."""
    object_ = stored(streams(LOSSY[0]), blocks())
    reader = streams(LOSSY[2] | {"device": "cuda:77"})
    assert np.array_equal(decoded(reader, object_), decoded(streams(LOSSY[0]), object_))


def test_quantized_and_opaque_blocks_are_refused_in_a_line() -> None:
    quantized = KVGeometry(layers=1, kv_heads=1, head_dim=8, dtype="float8_e4m3")
    with pytest.raises(GeometryError, match=r"dtype=float8_e4m3: only .* set compression.algorithm to none"):
        ladder_for(quantized, Compression(algorithm="cachegen"))
    with pytest.raises(GeometryError, match=r"opaque pages.* set compression.algorithm to none"):
        ladder_for(GEOMETRY, Compression(algorithm="lossless"), canonical=False)
    assert ladder_for(quantized, Compression(), canonical=False) is None


# --- the tier -----------------------------------------------------------------------------------------------------


def tier(path: Path, settings: dict[str, Any] | None, pin: Pin = "always") -> RemoteTier:
    made = ladder_for(GEOMETRY, Compression(**settings), pin) if settings else None
    return RemoteTier(
        open_store(f"file://{path}"),
        geometry=GEOMETRY,
        limits=LIMITS,
        object_bytes=BLOCKS * GEOMETRY.block_bytes,
        ladder=made,
    )


def moved(one: RemoteTier, rows: npt.NDArray[np.uint8]) -> None:
    ids = Rows(rows, np.arange(len(rows), dtype=np.int32))
    assert not any(one.write(prompt(1, len(rows)), 0, ids, namespace=namespace(), deadline=soon()).result(60))


def test_families_do_not_see_each_other(tmp_path: Path) -> None:
    """Loss is never handed to who has not asked for it."""
    families: list[dict[str, Any] | None] = [None, EXACT[0], LOSSY[0]]
    rows = blocks(6)
    for i, writer in enumerate(families):
        one = tier(tmp_path / str(i), writer)
        moved(one, rows)
        one.close(10)
        for reader in [*families, *EXACT, *LOSSY]:
            other = tier(tmp_path / str(i), reader)
            alike = (writer is None, writer in LOSSY) == (reader is None, reader in LOSSY)
            assert ask(other, prompt(1, 6)) == (6 if alike else 0)
            other.close(10)


def test_a_broken_object_is_dropped_and_a_part_of_one_can_be_read(tmp_path: Path) -> None:
    rows, keys = blocks(6), prompt(1, 6)
    one = tier(tmp_path, EXACT[0])
    moved(one, rows)
    assert one.stats()["compression_ratio"] > 1.1
    assert one.stats()["written_bytes"] < 2 * 4096 + 6 * 4096 / 1.1
    target = Rows(memory(3), np.array([2, 0, 1], np.int32))
    assert one.read(keys, 1, target, deadline=soon()).result(60) == [None] * 3
    assert np.array_equal(target.memory[[2, 0, 1]], rows[1:4])
    assert one.stats()["decompressed_objects_total"] == 1
    assert one.stats()["decompression_seconds_total"] > 0
    name = one._machine.packing.name(keys[3].tobytes()).decode()
    path = next(tmp_path.rglob(name.split("/")[-1]))
    path.write_bytes(path.read_bytes()[:-1])
    assert one.read(keys, 1, target, deadline=soon()).result(60) == [Reason.CORRUPT] * 3
    assert one.stats()["dropped_blocks"] == 4
    assert not path.exists()
    one.close(10)


def test_a_fast_store_is_given_blocks_as_they_are(tmp_path: Path) -> None:
    """What was measured decides, whatever is configured; and it is found all the same."""
    one = tier(tmp_path, LOSSY[1], "auto")
    assert one._machine.streams
    for size in (1 << 20, 8 << 20):
        one._machine.streams.loaded(size, size / 1e12)
    for codec in ("lossless", "cachegen"):
        one._machine.streams._ladder.decoded(codec, 1 << 20, 1.0)
    rows, keys = blocks(4), prompt(1, 4)
    moved(one, rows)
    assert one.stats()["compression_ratio"] == 1.0
    target = Rows(memory(4), np.arange(4, dtype=np.int32))
    assert one.read(keys, 0, target, deadline=soon()).result(60) == [None] * 4
    assert np.array_equal(target.memory, rows)
    one.close(10)


def test_a_time_slice_lost_in_a_rehearsal_is_no_cost_of_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 9.0, 9.5, 10.0, 12.0])
    monkeypatch.setattr("cairn.codec.ladder.time", SimpleNamespace(perf_counter=clock.__next__))
    rung = Rung(Raw(GEOMETRY))
    rung.rehearse(np.zeros((2, GEOMETRY.block_bytes), np.uint8))
    assert rung.cost == (1.0, 0.5 / (2 * GEOMETRY.block_bytes))


def test_the_ladder_of_a_level_leads_from_no_loss_down_to_it() -> None:
    found = ladder_for(GEOMETRY, Compression(algorithm="cachegen", quality="balanced", deadline_s=0.5))
    assert found
    assert [rung.codec.id for rung in found.rungs] == ["raw", "lossless", "cachegen", "cachegen", "cachegen"]
    found.rehearse()
    costs = [rung.cost for rung in found.rungs]
    shares = [cost.share for cost in costs]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert costs[-1].decode_s > 0
    size = 1 << 20
    assert found.choose(size, None) == (found.rungs[-1], Why.UNMEASURED)
    assert found.choose(size, lambda stored: stored / 1e4) == (found.rungs[-1], Why.FASTER)
    assert found.choose(size, lambda stored: stored / size * 0.2) == (found.rungs[0], Why.AS_FAST)
    for _ in range(100):
        found.decoded("raw", size, 1.0)
    assert found.choose(size, lambda stored: stored / size * 0.2)[0] is not found.rungs[0]
