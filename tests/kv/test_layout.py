"""Layouts: every value of a row finds its place, and parts that overlap or leave gaps are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tier.layouts import geometries, layouts, parallel, row_of

from cairn.codec import Raw, canonical_codec
from cairn.errors import GeometryError
from cairn.kv import CANONICAL, KVGeometry, Layout, Part

GEOMETRY = KVGeometry(layers=3, kv_heads=4, head_dim=2, block_tokens=2)


@settings(deadline=None)
@given(st.data())
def test_every_value_finds_its_place(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    layout = data.draw(layouts(geometry))
    row, canonical = row_of(geometry, layout, 1), row_of(geometry, CANONICAL, 1)
    codec = canonical_codec(geometry, layout)
    assert codec.encode(row).tobytes() == canonical.tobytes()
    back = canonical.copy()
    assert codec.decode(back, back)  # in place, as the remote tier does
    assert back.tobytes() == row.tobytes()
    assert (codec.id, codec.parameters) == (Raw.id, b"")


def test_what_is_canonical_anyway_says_so() -> None:
    assert parallel(GEOMETRY, 1, [3]) == CANONICAL
    assert parallel(GEOMETRY, 1, [1, 2]) == CANONICAL
    assert parallel(GEOMETRY, 2, [3]) != CANONICAL
    digests = {parallel(GEOMETRY, tp, [3], page).digest() for tp in (1, 2, 4) for page in ("canonical", "vllm_cpu")}
    assert len(digests) == 6
    assert CANONICAL.digest() == b""


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([Part(0, 3, 0, 2)], "head 2 of layer 0 stands in 0 parts"),
        ([Part(0, 3, 0, 4), Part(1, 1, 3, 1)], "head 3 of layer 1 stands in 2 parts"),
        ([Part(0, 3, 0, 5)], "must lie within"),
        ([Part(0, 3, 0, 4), Part(0, 1, -1, 1)], "must lie within"),
        ([Part(0, 0, 0, 4)], "must lie within"),
    ],
)
def test_parts_hold_each_head_once(parts: list[Part], why: str) -> None:
    with pytest.raises(GeometryError, match=why):
        Layout.of("canonical", tuple(parts), GEOMETRY)


def test_a_latent_has_no_keys_and_values() -> None:
    latent = KVGeometry.mla(layers=1, latent_dim=4, rope_dim=2, dtype="float16", block_tokens=2)
    with pytest.raises(GeometryError, match="must have K and V"):
        Layout.of("vllm_cpu", (), latent)
