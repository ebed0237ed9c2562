"""Chunks in an engine's tiers: named by their tokens alone, found there, and loaded to where a prompt has them."""

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch

from cairn.blend.base import BlendError, Canvas, Piece, Planes, Rope
from cairn.blend.rotation import Turn
from cairn.copy import PagedKV
from cairn.engine import CacheEngine, LayerLoad, Stage
from cairn.kv import KeyChain
from cairn.kv.keys import Tokens, chunk_root

#: A layer's copy out of DRAM takes milliseconds; one that takes this long will not come.
LAYER_TIMEOUT_S: Final = 30.0
NO_TOKENS: Final = np.zeros(0, np.uint32)


class ChunkStore:
    """The chunks of one model in one engine. Thread-safe.

    A chunk is a chain of blocks like a prompt's, from a root of its own, with the KV that its tokens have when nothing
    but a prelude stands before them: a function of the tokens, so that its keys say all. Tokens behind its last whole
    block are not kept.

    rope: the model's; prelude: the same few tokens before every chunk, with which a text begins and which draw the
    attention that else the chunk's own first tokens would draw (attention sinks, arXiv 2309.17453). Both are parts of
    the root.
    """

    def __init__(self, engine: CacheEngine, rope: Rope, prelude: Tokens = NO_TOKENS) -> None:
        self.engine = engine
        self.rope = rope
        self.prelude = prelude
        self._root = chunk_root(engine.chain().namespace, rope.digest() + prelude.tobytes())

    def chain(self, tokens: Tokens) -> KeyChain:
        """The keys of one chunk; what `CacheEngine` takes in place of tokens."""
        return KeyChain(self._root, self.engine.geometry.block_tokens, tokens)

    def find(self, tokens: Tokens, pieces: Sequence[Piece], start: int, whole: Stage | None = None) -> "Found":
        """What is held of those pieces of a prompt that reach beyond `start`, pinned, and counted as looked up.

        Tokens before `start` are at hand. whole: the prompt's own stage, which counts what is missed. Waits for lower
        tiers within the engine's deadline. To be released, before `whole`.
        """
        wanted = [(piece, self.chain(tokens[piece.start : piece.stop])) for piece in pieces if piece.stop > start]
        asked = [answer for _, chain in wanted if (answer := self.engine.ask(chain)) is not None]
        wait(asked, self.engine.config.storage.remote.lookup_timeout_s)
        stages = [
            _Staged(piece, chain, self.engine.stage(chain, first_token=max(0, start - piece.start)))
            for piece, chain in wanted
        ]
        if whole:
            for staged in stages:
                staged.stage.part_of(whole)
        found = Found(stages, start, len(self.prelude))
        hits, lookups = self.engine.metrics.blend_hits, self.engine.metrics.blend_lookups
        for counter, some in ((lookups, [piece for piece, _ in wanted]), (hits, found.reused)):
            counter.add(len(some), unit="chunks")
            counter.add(sum(piece.stop - max(piece.start, start) for piece in some), unit="tokens")
        return found

    def store(self, chain: KeyChain, kv: PagedKV) -> int:
        """Stores a chunk that was computed behind the prelude alone, in slots 0, 1, ... of `kv` prelude and chunk;
        returns how many tokens are new.
        """
        return self.engine.store(chain, kvcaches=kv, slot_mapping=len(self.prelude) + np.arange(chain.tokens))


class _Staged(NamedTuple):
    piece: Piece
    chain: KeyChain
    stage: Stage


class Found:
    """What is held of a prompt's chunks, kept until `release` (a context manager does it).

    reused: the tokens that can be loaded, ascending. missing: chunks that are not held whole, to be computed alone and
    stored when there is time.
    """

    def __init__(self, staged: Sequence[_Staged], start: int, prelude: int) -> None:
        self.reused: list[Piece] = []
        self.missing: list[Piece] = []
        self._staged = staged
        self._loading: list[Stage] = []
        self._origins: list[int] = []
        for piece, chain, stage in staged:
            held = stage.wait()
            if held < len(chain) * chain.block_tokens:
                self.missing.append(piece)
            some = Piece(max(piece.start, start), piece.start + held)
            if some.stop > some.start:
                self.reused.append(some)
                self._loading.append(stage)
                self._origins.append(piece.start - prelude)

    def load(self, kv: PagedKV, planes: Callable[[int], Planes], rope: Rope, *before: LayerLoad) -> "ChunkLoad":
        """Starts to copy all that is held into `kv`, token i of the prompt into slot i, layer after layer.

        planes: the same memory, layer by layer. before: other loads of the same layers.
        """
        loads = [
            stage.load_layers(kv, np.arange(piece.start, piece.stop, dtype=np.int64))
            for piece, stage in zip(self.reused, self._loading, strict=True)
        ]
        return ChunkLoad([*before, *loads], planes, rope, list(zip(self.reused, self._origins, strict=True)))

    def release(self) -> None:
        """Stops loads under way and gives the blocks back. Idempotent."""
        for staged in self._staged:
            staged.stage.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ChunkLoad(Canvas):
    """The canvas of a prompt whose chunks an engine loads: while a layer is computed, later ones come."""

    def __init__(
        self,
        loads: Sequence[LayerLoad],
        planes: Callable[[int], Planes],
        rope: Rope,
        moved: Sequence[tuple[Piece, int]],
    ) -> None:
        self._loads = loads
        self._planes = planes
        device: Any = planes(0)[0].device
        rows = [torch.arange(piece.start, piece.stop, device=device) for piece, _ in moved]
        self._rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)
        origins = [row - origin for row, (_, origin) in zip(rows, moved, strict=True)]
        self._turn = Turn.between(rope, torch.cat(origins) if rows else self._rows, rope, self._rows)

    def load(self, layer: int) -> Planes:
        for load in self._loads:
            if not load.wait(layer, LAYER_TIMEOUT_S):
                raise BlendError(f"layer {layer} of a chunk did not come; the prompt is computed behind its prefix")
        planes = self._planes(layer)
        self._turn.apply(planes[0], self._rows)
        return planes

    def finish(self, layer: int) -> None:
        pass
