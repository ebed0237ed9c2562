"""What blending a prompt computes: pure arithmetic."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from cairn.plan.cost import Work

#: Until prefills about as long have been measured, a prompt is blended if this share of what stands behind its prefix
#: is computed at most: the rest of the gain goes for loading, turning and choosing.
MOST_COMPUTED: Final = 0.8


class Blend(NamedTuple):
    """A prompt that could be blended.

    prompt: its tokens. start, stop: leading tokens are exact without it, blending makes tokens start..stop, and what is
    behind is computed as ever. reused: (first, behind the last) of the tokens that come from chunks, ascending.
    check_layers, ratios, head_tokens: see `cairn.blend.Recipe`. layers: of the model.
    """

    prompt: int
    start: int
    stop: int
    reused: Sequence[tuple[int, int]]
    check_layers: Sequence[int]
    ratios: Sequence[float]
    head_tokens: int
    layers: int

    @property
    def loaded(self) -> int:
        """Tokens that come from chunks."""
        return sum(stop - start for start, stop in self.reused)

    @property
    def share(self) -> float:
        """The share of tokens times layers that is computed, of tokens start..stop."""
        tokens, loaded = self.stop - self.start, self.loaded
        fresh = tokens - loaded + sum(min(self.head_tokens, stop - start) for start, stop in self.reused)
        if not any(self.ratios):
            return min(1.0, fresh / tokens)
        edges = [*self.check_layers, self.layers]
        work = float(edges[0] * tokens)
        for ratio, layer, following in zip(self.ratios, edges, edges[1:], strict=False):
            work += (following - layer) * min(tokens, fresh + ratio * loaded)
        return work / (self.layers * tokens)

    @property
    def work(self) -> Work:
        """What is computed, as so much of a prefill."""
        tokens, share = self.stop - self.start, self.share
        return Work(round(share * tokens), share * tokens * (self.start + tokens / 2))
