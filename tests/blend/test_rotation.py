"""Keys turned to other positions are those that the model computes there."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cairn.blend import Rope, Turn

pytest.importorskip("triton")

SCALED = {"factor": 8.0, "original_max_position_embeddings": 8192}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": SCALED,
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
DIM = 64


def rotary(kind: str, length: int) -> tuple[Any, Rope]:
    """Transformers' own rotary embedding as it is in a prompt of `length` tokens, and its RoPE."""
    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]},
    )
    module = LlamaRotaryEmbedding(config)
    module(torch.zeros(1), torch.tensor([[length - 1]]))  # dynamic NTK: the frequencies follow the length
    return module, Rope(module.inv_freq.numpy(), module.attention_scaling)


def keys_at(module: Any, raw: Any, positions: Any) -> Any:
    """Keys [tokens, heads, dim] as the model computes them at these positions."""
    cosines, sines = module(raw, positions[None])
    return apply_rotary_pos_emb(raw[None], raw[None], cosines, sines, unsqueeze_dim=2)[1][0]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1 << 30), start=st.integers(0, 131_000), count=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_turned_keys_are_the_models(kind: str, seed: int, start: int, count: int) -> None:
    raw = torch.randn(count, 2, DIM, generator=torch.Generator().manual_seed(seed))
    at, to = torch.arange(count), torch.arange(start, start + count)
    old_module, old = rotary(kind, count)
    keys = keys_at(old_module, raw, at)
    new_module, new = rotary(kind, start + count)
    Turn.between(old, at, new, to).apply(keys, torch.arange(count))
    torch.testing.assert_close(keys, keys_at(new_module, raw, to), rtol=0, atol=1e-5)


def test_rows_dims_and_order() -> None:
    """Only the named rows and the pairs' dims turn; interleaved pairs are neighbours."""
    rope = rotary("yarn", 100)[1]
    partial = Rope(rope.frequencies[:8], rope.scaling)
    keys = torch.randn(9, 2, DIM)
    rows, at, to = torch.tensor([7, 2]), torch.tensor([3, 4]), torch.tensor([50, 9])
    turned = keys.clone()
    Turn.between(partial, at, partial, to).apply(turned, rows)
    assert torch.equal(turned[:, :, 16:], keys[:, :, 16:])
    assert torch.equal(turned[[0, 1, 3, 4, 5, 6, 8]], keys[[0, 1, 3, 4, 5, 6, 8]])
    neighbours = keys[:, :, :16].unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2).contiguous()
    Turn.between(partial._replace(interleaved=True), at, partial._replace(interleaved=True), to).apply(neighbours, rows)
    torch.testing.assert_close(neighbours.unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2), turned[:, :, :16])
    assert len({r.digest() for r in (rope, partial, rope._replace(scaling=2.0), rope._replace(interleaved=True))}) == 4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "pairs"), [(3, 16, 8), (2, 20, 6), (1, 64, 32)])
def test_the_kernel_does_what_torch_does(heads: int, dim: int, pairs: int, interleaved: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
        kernel = importlib.import_module("cairn.blend.triton_kernel")
    frequencies = torch.rand(pairs, generator=torch.Generator().manual_seed(pairs)).numpy()
    rope = Rope(frequencies, 1.2, interleaved)
    rows = torch.randperm(40)[:19]
    turn = Turn.between(rope._replace(scaling=1.0), torch.arange(19), rope, rows)
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.randn(heads, 40, dim).to(dtype)  # heads first: strides are the caller's
        expected = whole.clone()
        turn.apply(expected.transpose(0, 1), rows)
        kernel.turn(whole.transpose(0, 1), rows, turn.cosines, turn.sines, interleaved=interleaved)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(whole, expected, rtol=tolerance, atol=tolerance)
