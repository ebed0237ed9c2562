"""The forward pass that blends: all tokens up to the first check layer, from there on those that matter."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cairn.blend.base import BlendModel, Canvas, Piece
from cairn.blend.selection import deviation, keep
from cairn.errors import InputError


class Recipe(NamedTuple):
    """How much is computed anew. ratios[i]: from check_layers[i] on, the share of reused tokens that is; ratios do not
    grow. head_tokens: of each chunk, the first ones are computed whatever they deviate: in a chunk that was computed
    alone they drew the attention that goes to the beginning of a text (attention sinks, arXiv 2309.17453).
    """

    check_layers: tuple[int, ...] = (3,)
    ratios: tuple[float, ...] = (0.15,)
    head_tokens: int = 4

    def validate(self, layers: int) -> None:
        """Raises InputError where a model of so many layers lacks one of these."""
        if self.check_layers and self.check_layers[-1] >= layers:
            raise InputError(f"blending.check_layers={list(self.check_layers)}: the model has layers 0..{layers - 1}")


@torch.inference_mode()  # type: ignore[untyped-decorator]
def blend(
    model: BlendModel, tokens: Any, canvas: Canvas, start: int, reused: Sequence[Piece], recipe: Recipe
) -> list[int]:
    """Makes the KV of tokens start..len(tokens) complete; returns how many tokens each layer computed.

    tokens: int64 [n] on the model's device. Tokens before `start` and those of `reused` are in the planes that `canvas`
    gives, the former exact. Every other token is computed, and so are those that `recipe` says. A ratio of 1 computes
    everything, as a prefill would. Nothing reused is a prefill too.
    """
    if len(tokens) <= start:
        return []
    positions = torch.arange(start, len(tokens), device=tokens.device)
    forced = torch.ones(len(positions), dtype=torch.bool, device=tokens.device)
    for piece in reused:
        forced[max(piece.start + recipe.head_tokens, start) - start : max(piece.stop, start) - start] = False
    loaded = sum(max(0, piece.stop - max(piece.start, start)) for piece in reused)
    shares = dict(zip(recipe.check_layers, recipe.ratios, strict=True)) if loaded and any(recipe.ratios) else {}
    if shares:
        recipe.validate(model.layers)
    else:
        positions, forced = positions[forced], forced[forced]
    hidden = model.embed(tokens[positions])
    computed = []
    for layer in range(model.layers):
        planes = canvas.load(layer)
        queries, keys, values = model.project(layer, hidden, positions)
        if layer in shares and shares[layer] < 1:
            count = math.ceil(shares[layer] * loaded)
            rows = keep(deviation(keys, values, planes, positions), forced, count)
            positions, forced, hidden = positions[rows], forced[rows], hidden[rows]
            queries, keys, values = queries[rows], keys[rows], values[rows]
        planes[0][positions], planes[1][positions] = keys, values
        canvas.finish(layer)
        computed.append(len(positions))
        if layer + 1 < model.layers and len(positions):
            hidden = model.advance(layer, hidden, model.attend(layer, queries, planes, positions))
    return computed
