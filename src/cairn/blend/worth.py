"""Whether blending pays: pure arithmetic over what it computes."""

from collections.abc import Sequence
from typing import Final

from cairn.blend.base import Piece
from cairn.blend.forward import Recipe

#: Blending is left alone unless it computes at most this share of what stands behind the prefix: the rest of the gain
#: goes for loading, turning and choosing.
MOST_COMPUTED: Final = 0.8


def computed_share(recipe: Recipe, layers: int, tokens: int, reused: Sequence[Piece]) -> float:
    """The share of `tokens` times `layers` that blending computes, `tokens` being those behind the exact prefix."""
    heads = sum(min(recipe.head_tokens, piece.stop - piece.start) for piece in reused)
    loaded = sum(piece.stop - piece.start for piece in reused)
    fresh = tokens - loaded
    edges = [*recipe.check_layers, layers]
    if not any(recipe.ratios):
        return min(1.0, (fresh + heads) / tokens)
    work = float(edges[0] * tokens)
    for ratio, layer, following in zip(recipe.ratios, edges, edges[1:], strict=False):
        work += (following - layer) * min(tokens, fresh + heads + ratio * loaded)
    return work / (layers * tokens)


def pays(recipe: Recipe, layers: int, tokens: int, reused: Sequence[Piece]) -> bool:
    """Whether blending `tokens` behind the exact prefix is worth its overhead."""
    return bool(reused) and computed_share(recipe, layers, tokens, reused) <= MOST_COMPUTED
