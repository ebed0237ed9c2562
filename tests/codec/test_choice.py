"""Names of the configuration -> codecs."""

from typing import Any, get_args

import pytest

from cairn.codec.choice import codec_for
from cairn.codec.levels import LEVELS
from cairn.config.schema import Algorithm, Quality
from cairn.errors import InputError
from cairn.kv import KVGeometry

GEOMETRY = KVGeometry(layers=1, kv_heads=1, head_dim=8)


def test_every_name_makes_a_codec_of_its_own() -> None:
    ids = {codec_for(GEOMETRY, name, quantization_bits=bits).id for name in get_args(Algorithm) for bits in (4, 8)}
    assert ids == {"raw", "lossless", "packed", "fp8", "int4", "int8", "cachegen"}
    assert get_args(Quality) == tuple(LEVELS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "zip"}, "one of none, lossless"),
        ({"algorithm": "int", "quantization_bits": 3}, "must be 4 or 8"),
        ({"algorithm": "cachegen", "quality": "good"}, "one of near-lossless"),
    ],
)
def test_other_names_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        codec_for(GEOMETRY, **settings)
