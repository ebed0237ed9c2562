"""What the scheduler's side knows of one request."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cairn.connect.vllm import handover
from cairn.connect.vllm.blending import Chunks
from cairn.engine.stage import Stage
from cairn.engine.writing import Writing
from cairn.kv import KeyChain


@dataclass(slots=True)
class Tracked:
    """One request that vLLM has asked about.

    pages: its blocks in the paged cache. stage: what it will load or is loading. loading: the numbers of the copies
    that do. layered: whether a step waits for them. writings: what it is storing, by the copies' numbers. offered:
    blocks offered for storing so far.
    computed: tokens that have KV once the step is over. finished: it is over. held: and vLLM keeps its blocks for us.
    loads: false once a load of it has failed: it is not tried again. chunks: what it will be blended from, or is.
    blends: false once that was found not to pay. exact: its blocks from there on are no prefix's. asked, answer,
    ask_until: whether a remote store was asked about it, how it goes, and until when that is waited for. promise: what
    a prefill instance has stored.
    """

    request: Any
    chain: KeyChain
    pages: list[int] = field(default_factory=list)
    stage: Stage | None = None
    loading: set[int] = field(default_factory=set)
    layered: bool = False
    writings: dict[int, Writing] = field(default_factory=dict)
    offered: int = 0
    computed: int = 0
    finished: bool = False
    held: bool = False
    loads: bool = True
    chunks: Chunks | None = None
    blends: bool = True
    exact: int = 1 << 30
    asked: bool = False
    answer: Future[None] | None = None
    ask_until: float = 0.0
    promise: handover.Promise | None = None

    def scheduled(self, computed: int, pages: list[int], *, anew: bool) -> None:
        """A step was put together: so many tokens will have KV when it is over, in these pages besides those that it
        has, or, anew, in these alone.
        """
        self.computed = computed
        if anew:
            self.pages = list(pages)
        else:
            self.pages.extend(pages)

    def whole_blocks(self, block_tokens: int) -> int:
        """Blocks whose tokens are known and whose KV is computed once the step is over."""
        known: int = min(self.computed, self.request.num_tokens, len(self.pages) * block_tokens)
        return min(known // block_tokens, self.exact)
