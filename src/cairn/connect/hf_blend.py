"""Transformers' models as blending wants them: layer by layer, out of their own modules."""

from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cairn.blend import Planes, Projected, Rope, attend


class HfBlendModel:
    """A Llama, Mistral, Qwen2 or Qwen3 as a `BlendModel`; `refuse_blending` says which others are not.

    Calls the model's own submodules in the order of its forward pass, which is neither patched nor used. tokens: of the
    prompt, for which the rotary embedding is computed once. Owned by one thread.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        body = model.base_model
        self.layers = len(body.layers)
        self.rope = rope_of(model)
        self._body = body
        positions = torch.arange(tokens, device=model.device)[None]
        with torch.inference_mode():
            self._rotation = body.rotary_emb(torch.empty(0, dtype=model.dtype, device=model.device), positions)

    def embed(self, tokens: Any) -> Any:
        return self._body.embed_tokens(tokens)

    def project(self, layer: int, hidden: Any, positions: Any) -> Projected:
        block = self._body.layers[layer]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        shape = (1, len(hidden), -1, attention.head_dim)
        queries, keys = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        cosines, sines = (part[:, positions] for part in self._rotation)
        queries, keys = apply_rotary_pos_emb(queries, keys, cosines, sines, unsqueeze_dim=2)
        return queries[0], keys[0], attention.v_proj(normed).view(shape)[0]

    def attend(self, layer: int, queries: Any, planes: Planes, positions: Any) -> Any:
        return attend(queries, planes, positions, self._body.layers[layer].self_attn.scaling)

    def advance(self, layer: int, hidden: Any, attended: Any) -> Any:
        block = self._body.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attended.reshape(len(hidden), -1))
        return hidden + block.mlp(block.post_attention_layernorm(hidden))


def rope_of(model: Any) -> Rope:
    """How a model's keys turn: its own frequencies and scaling, whatever kind they are of."""
    rotary = model.base_model.rotary_emb
    return Rope(rotary.inv_freq.float().cpu().numpy(), float(rotary.attention_scaling))
