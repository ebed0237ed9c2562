"""Blending for Transformers: its models layer by layer, out of their own modules, and what a prompt's cache needs."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cairn.blend import (
    ChunkLoad,
    ChunkStore,
    Planes,
    Projected,
    Recipe,
    Rope,
    attend,
    blend,
    join,
    prelude_of,
    recipe_of,
    refuse_blending,
    separator_of,
    split,
)
from cairn.connect.hf_layer import Tensors
from cairn.copy import PagedKV
from cairn.engine import CacheEngine, LayerLoad, Stage
from cairn.kv import as_tokens
from cairn.kv.keys import Tokens
from cairn.plan import Blend


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


class Blended(NamedTuple):
    """What blending did for one prompt. stop: its KV is there up to this token; exact: and equal to a prefill's up to
    this one. reused: tokens that came from chunks. missing: chunks to learn.
    """

    stop: int
    exact: int
    reused: int
    missing: list[Tokens]


class Blender:
    """Blends the prompts of one model as `engine.config.blending` says. Thread-safe as far as the model is.

    tokenizer: the model's, for `special_str`. recipe: instead of what settings and the model's check say (see
    `recipe_of`). Raises GeometryError for a model that cannot be blended, InputError for settings that do not fit it.
    """

    def __init__(self, model: Any, engine: CacheEngine, tokenizer: Any, recipe: Recipe | None = None) -> None:
        refuse_blending(model.config)
        settings = engine.config.blending
        self.recipe = recipe or recipe_of(settings, model.config.name_or_path, engine.geometry.layers)
        self.recipe.validate(engine.geometry.layers)
        self.separator = separator_of(settings.special_str, tokenizer)
        self.chunks = ChunkStore(engine, rope_of(model), prelude_of(self.separator, tokenizer))
        self._autopilot = engine.autopilot
        self._model = model

    def fill(
        self,
        tokens: Tokens,
        start: int,
        kv: PagedKV,
        buffers: list[Tensors],
        before: LayerLoad | None,
        whole: Stage | None,
    ) -> Blended:
        """Loads and computes a prompt's KV from `start` on, up to its last chunk that is held, if that pays.

        What stands at the prompt's beginning is no chunk but a prefix, and computed if it is not held as one.

        tokens: the prompt. kv, buffers: where its KV belongs, the same memory. before: the load of what comes before
        `start`. whole: the prompt's stage. Raises BlendError when a layer does not come; then the KV before `start` is
        as it was.
        """
        pieces = [piece for piece in split(tokens, self.separator)[:-1] if piece.start]
        if not pieces or not self._autopilot.blends:
            return Blended(start, start, 0, [])
        with self.chunks.find(tokens, pieces, start, whole) as found:
            missing = [tokens[piece.start : piece.stop] for piece in found.missing]
            stop = found.reused[-1].stop if found.reused else start
            facts = Blend(len(tokens), start, stop, found.reused, *self.recipe, layers=len(buffers))
            plan = self._autopilot.blend(facts)
            if not plan.yes:
                return Blended(start, start, 0, missing)
            began = time.perf_counter()
            canvas = found.load(kv, _planes_of(buffers), self.chunks.rope, *([before] if before else []))
            blend(HfBlendModel(self._model, stop), _ids(tokens[:stop]), canvas, start, found.reused, self.recipe)
            self._autopilot.blended(plan, time.perf_counter() - began)
            return Blended(stop, found.reused[0].start, facts.loaded, missing)

    def join(self, parts: Sequence[Any]) -> Tokens:
        """A prompt's token ids out of those of its parts: system prompt, chunks, question; see `cairn.blend.join`."""
        return join(parts, self.separator)

    def learn(self, tokens: Any) -> int:
        """Computes a chunk alone and stores it, unless it is held; returns how many tokens are new.

        tokens: its ids [n], as they stand between separators; without separators, a text that is cut as prompts are.
        """
        ids = as_tokens(tokens)
        return sum(self._learn(ids[start:stop]) for start, stop in split(ids, self.separator))

    def _learn(self, ids: Tokens) -> int:
        chain = self.chunks.chain(ids)
        geometry = self.chunks.engine.geometry
        whole = len(chain) * geometry.block_tokens
        if not whole or self.chunks.engine.lookup(chain) == whole:
            return 0
        text = np.concatenate([self.chunks.prelude, ids[:whole]])
        shape = (geometry.layers, 2, 1, geometry.kv_heads, len(text), geometry.head_dim)
        buffers = [(layer[0], layer[1]) for layer in torch.empty(shape, dtype=self._model.dtype)]
        canvas = ChunkLoad((), _planes_of(buffers), self.chunks.rope, ())
        blend(HfBlendModel(self._model, len(text)), _ids(text), canvas, 0, (), self.recipe)
        return self.chunks.store(chain, PagedKV.from_tensors(buffers, "transformers", geometry))


def _ids(tokens: Tokens) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def _planes_of(buffers: list[Tensors]) -> Callable[[int], Planes]:
    """Transformers' [1, heads, room, dim] as blending has them: [room, heads, dim]."""
    return lambda layer: (buffers[layer][0][0].transpose(0, 1), buffers[layer][1][0].transpose(0, 1))
