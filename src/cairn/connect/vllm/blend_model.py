"""vLLM's Llama, Mistral, Qwen2 and Qwen3 as blending wants them: layer by layer, out of their own modules."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cairn.blend import Planes, Projected, Rope, attend
from cairn.connect.vllm import plugin
from cairn.errors import GeometryError

#: Rows that go through an MLP at once: its intermediate values are several times as wide as a layer's output, and
#: vLLM has left room for a step's tokens only.
_MLP_ROWS: Final = 2048
#: Positions at which a rotary embedding is compared with what was read off it.
_CHECKED: Final = 4096


class VllmBlendModel:
    """A model's `body` (embedding and decoder layers) as a `BlendModel`. Owned by the model runner's thread.

    Its modules are called in the order of their own forward pass, which is neither patched nor used.
    """

    def __init__(self, body: Any) -> None:
        self.layers = len(body.layers)
        self.rope = rope_of(body.layers[0].self_attn.rotary_emb)
        self._body = body

    def embed(self, tokens: Any) -> Any:
        return self._body.embed_tokens(tokens)

    def project(self, layer: int, hidden: Any, positions: Any) -> Projected:
        block = self._body.layers[layer]
        attention = block.self_attn
        rows, dim = len(hidden), attention.head_dim
        states, _ = attention.qkv_proj(block.input_layernorm(hidden))
        queries, keys, values = states.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        if hasattr(attention, "q_norm"):
            queries = attention.q_norm(queries.reshape(rows, -1, dim)).view(queries.shape)
            keys = attention.k_norm(keys.reshape(rows, -1, dim)).view(keys.shape)
        queries, keys = attention.rotary_emb(positions, queries, keys)
        return queries.view(rows, -1, dim), keys.view(rows, -1, dim), values.view(rows, -1, dim)

    def attend(self, layer: int, queries: Any, planes: Planes, positions: Any) -> Any:
        return attend(queries, planes, positions, self._body.layers[layer].self_attn.scaling)

    def advance(self, layer: int, hidden: Any, attended: Any) -> Any:
        block = self._body.layers[layer]
        out, _ = block.self_attn.o_proj(attended.reshape(len(hidden), -1))
        hidden = hidden + out
        for rows in hidden.split(_MLP_ROWS):
            rows += block.mlp(block.post_attention_layernorm(rows))
        return hidden


def model_of(attentions: Sequence[Any]) -> VllmBlendModel:
    """The model whose layers have these attentions, in this order. Raises GeometryError, with the reason, if there is
    none that can be blended.
    """
    body = plugin.body_with(attentions)
    if body is None:
        raise GeometryError(
            "the loaded model is not known: vLLM has not run Cairn's plugin (entry point vllm.general_plugins, "
            "VLLM_PLUGINS), or its layers are built in another way"
        )
    first = body.layers[0]
    needed = {
        body: ("embed_tokens",),
        first: ("input_layernorm", "post_attention_layernorm", "mlp"),
        first.self_attn: ("qkv_proj", "o_proj", "rotary_emb", "q_size", "kv_size", "head_dim", "scaling"),
    }
    missing = [
        f"{type(module).__name__}.{name}" for module in needed for name in needed[module] if not hasattr(module, name)
    ]
    if missing:
        raise GeometryError(f"this version's model has no {', '.join(missing)}")
    return VllmBlendModel(body)


def rope_of(rotary: Any) -> Rope:
    """How a rotary embedding of vLLM's turns keys, read off its own cosines and sines, whatever made them.

    Row 2**k of the table is the angle of a pair times 2**k, exactly, and each next one says which of the turns that the
    one before allows it was: the last gives the frequency to its last bit. Raises GeometryError for a table that does
    not come from fixed frequencies.
    """
    table = rotary._compute_cos_sin_cache().double().cpu().numpy()
    cosines, sines = np.split(table, 2, axis=1)
    scaling = float(np.hypot(cosines[0, 0], sines[0, 0]))
    angles = np.arctan2(sines, cosines)
    frequencies, power = angles[1], 1
    while (power := 2 * power) < len(table):
        turns = np.round((frequencies * power - angles[power]) / (2 * np.pi))
        frequencies = (angles[power] + turns * 2 * np.pi) / power
    rope = Rope(frequencies.astype(np.float32), scaling, interleaved=not rotary.is_neox_style)
    rows = np.arange(0, len(table), -(-len(table) // _CHECKED))
    expected = scaling * np.exp(1j * (rows.astype(np.float32)[:, None] * rope.frequencies))
    off = np.abs(expected - (cosines[rows] + 1j * sines[rows])).max()
    # An angle in float32 is off by a few units in its last place, more so where positions are scaled, too.
    if not off <= 1e-5 * scaling + 2.0**-21 * len(table) * float(rope.frequencies.max()):
        raise GeometryError(f"its rotary embedding ({type(rotary).__name__}) has no fixed frequencies")
    return rope
