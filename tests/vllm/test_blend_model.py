"""What blending reads off vLLM's modules."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cairn.connect.vllm.blend_model import rope_of
from cairn.errors import GeometryError

DIM, POSITIONS, TRAINED = 64, 4096, 2048
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": LLAMA3,
    "ntk": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "max_trained_positions": TRAINED},
}


def rotary(rope: dict[str, Any], *, neox: bool = True) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(DIM, POSITIONS, is_neox_style=neox, rope_parameters=rope, dtype=torch.bfloat16)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_the_models_own(kind: str, theta: float) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta} | KINDS[kind]
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=1, max_position_embeddings=TRAINED)
    config.rope_parameters = parameters
    exponents, scaling = torch.arange(0, DIM, 2) / DIM, 1.0
    if kind == "default":
        expected = 1.0 / theta**exponents
    elif kind == "ntk":  # Transformers has it not
        expected = 1.0 / (2.0 * theta) ** exponents / 2.0 ** (2 / DIM)
    else:  # dynamic: for a prompt of so many tokens
        expected, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=POSITIONS)
    rope = rope_of(rotary(parameters))
    np.testing.assert_allclose(rope.frequencies, expected.numpy(), rtol=3e-7)
    assert rope.scaling == pytest.approx(scaling)
    assert not rope.interleaved


def test_neighbouring_pairs() -> None:
    assert rope_of(rotary({"rope_type": "default", "rope_theta": 1e4}, neox=False)).interleaved


def test_positions_without_fixed_frequencies_are_refused() -> None:
    table = rotary({"rope_type": "default", "rope_theta": 1e4})._compute_cos_sin_cache()
    bent = torch.cat([table[:100], table[200:]])

    class Bent:
        is_neox_style = True

        def _compute_cos_sin_cache(self) -> Any:
            return bent

    with pytest.raises(GeometryError, match=r"Bent.* no fixed frequencies"):
        rope_of(Bent())
