from types import SimpleNamespace

import pytest

from cairn.errors import GeometryError
from cairn.kv import KVGeometry


def config(**fields: object) -> SimpleNamespace:
    base = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 256}
    return SimpleNamespace(**{**base, **fields})


@pytest.mark.parametrize(
    ("fields", "heads", "dim", "planes"),
    [
        ({}, 8, 32, 2),  # MHA
        ({"num_key_value_heads": 2}, 2, 32, 2),  # GQA
        ({"num_key_value_heads": 1}, 1, 32, 2),  # MQA
        ({"num_key_value_heads": 2, "head_dim": 128}, 2, 128, 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 1, 576, 1),  # MLA
        ({"sliding_window": 4096, "use_sliding_window": False}, 8, 32, 2),
        ({"layer_types": ["full_attention"] * 4}, 8, 32, 2),
    ],
)
def test_from_hf(fields: dict[str, object], heads: int, dim: int, planes: int) -> None:
    geometry = KVGeometry.from_hf(config(**fields), dtype="bfloat16", block_tokens=16)
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.planes) == (4, heads, dim, planes)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["linear_attention"]},
        {"attention_chunk_size": 8192},
    ],
)
def test_models_whose_kv_is_not_the_whole_prefix_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(GeometryError):
        KVGeometry.from_hf(config(**fields), dtype="bfloat16")


def test_bytes() -> None:
    geometry = KVGeometry(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=16)
    assert geometry.token_bytes == 131_072
    assert geometry.block_bytes == 2 << 20
    assert geometry.layer_bytes * geometry.layers == geometry.block_bytes
    assert geometry.block_shape == (32, 2, 16, 8, 128)


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"kv_heads": -1}, {"head_dim": 0}, {"block_tokens": 0}, {"dtype": "int3"}, {"planes": 3}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"layers": 1, "kv_heads": 1, "head_dim": 1, **wrong}
    name, value = next(iter(wrong.items()))
    with pytest.raises(GeometryError, match=f"{name}={value!r}"):
        KVGeometry(**fields)  # type: ignore[arg-type]
