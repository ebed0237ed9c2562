"""The worker's side of blending on paged caches of every order, against plain prefill."""

import random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from cairn.blend import BlendError, Piece, Recipe
from cairn.codec.quantized import quantizer_for
from cairn.connect.hf_blend import HfBlendModel
from cairn.connect.vllm.blender import Blender
from cairn.connect.vllm.messages import Blend, Learn, Part
from cairn.connect.vllm.movers import mover_for
from cairn.connect.vllm.pages import Pages, prove_order
from cairn.connect.vllm.places import Places
from cairn.errors import GeometryError
from cairn.kv import KVGeometry, Layout
from cairn.node.base import Home
from cairn.tier.arena import Arena
from tests.blend.rig import LAYERS, model_of, prefill, tokens_of

BLOCK = 8
G = KVGeometry(layers=LAYERS, kv_heads=2, head_dim=8, dtype="float32", block_tokens=BLOCK)
PROMPT = tokens_of(1, 200)
PRELUDE = tokens_of(9, 3)
#: Chunks of the prompt, at any alignment, and where each begins; the first is its prefix.
PIECES = [Piece(0, 24), Piece(27, 67), Piece(70, 126), Piece(126, 158)]


class Rig:
    """A blender, its pages in random order and all full of noise, and an arena with every chunk.

    kind: of pages. codec: of the arena's rows, for vectors and blocks of 16.
    """

    def __init__(
        self, kind: str, recipe: Recipe, pieces: list[Piece] = PIECES, block: int = BLOCK, codec: str = "none"
    ) -> None:
        dim = 16 if codec != "none" else 8
        self.geometry = g = msgspec.structs.replace(G, head_dim=dim, block_tokens=block)
        self.pieces, self.stop = pieces, pieces[-1].stop
        pages = -(-self.stop // block) + 2
        shapes = {
            "nhd": (2, pages, block, 2, dim),
            "nhd_paged": (pages, 2, block, 2, dim),
            "vllm_cpu": (pages, 2, block, 2 * dim),
            "packed": (pages, block, 2, 2 * dim),
        }
        self.layout = Layout("vllm_cpu" if kind == "vllm_cpu" else "canonical")
        self.caches = [torch.randn(shapes[kind]) for _ in range(LAYERS)]
        if kind == "packed":  # as FlashAttention's: heads are told before tokens, and stand behind them
            self.caches = [cache.transpose(1, 2) for cache in self.caches]
        quantizer = quantizer_for(g, codec)
        row = (quantizer.stored if quantizer else g).block_bytes
        slots = sum(-(-(stop - start + 3) // block) for start, stop in pieces)
        self.arena = Arena(slots, -(-row // 4096) * 4096)
        self.model = model_of(head_dim=dim)

        def mover(arena: Arena) -> Any:
            return mover_for(
                self.caches,
                g,
                arena.memory[:, :row],
                arena.memory,
                threads=1,
                overlapping=False,
                quantizer=quantizer,
                page=self.layout,
            )

        self.places = Places(mover, self.arena)
        model = HfBlendModel(self.model, len(PROMPT))
        self.blender = Blender(model, recipe, g, self.layout, self.caches, self.places, 10.0, quantizer)
        self.pages = np.random.default_rng(2).permutation(pages)[: -(-self.stop // block)].tolist()
        self.rows: list[list[int]] = []
        free = iter(np.random.default_rng(3).permutation(slots).tolist())
        for number, piece in enumerate(pieces):
            alone = np.concatenate([PRELUDE if number else PRELUDE[:0], PROMPT[piece.start : piece.stop]])
            self.rows.append([next(free) for _ in range(len(alone) // block)])
            whole = alone[: len(self.rows[-1]) * block]
            learned = self.blender.learn(Learn(number, "a", whole.tobytes(), 0, self.rows[-1]))
            assert learned.exception() is None

    def order(self, start: int, computed: int) -> Blend:
        """Blends all but the first piece. start, computed: as in Chunks.order."""
        block = self.geometry.block_tokens
        parts = [Part(computed, start, 0, self.rows[0][computed // block :])] if start > computed else []
        for piece, rows in zip(self.pieces[1:], self.rows[1:], strict=True):
            origin, first = piece.start - len(PRELUDE), max(piece.start, start)
            if (stop := origin + len(rows) * block) > first:
                parts.append(Part(first, stop, origin, rows[(first - origin) // block :]))
        cut = computed // block
        return Blend(9, "a", PROMPT[: self.stop].tobytes(), start, parts, self.pages[:cut], self.pages[cut:])

    def planes(self, layer: int) -> list[Any]:
        pages = Pages.of(self.caches[layer], self.geometry, self.layout)
        return [plane[torch.tensor(self.pages)].flatten(0, 1)[: self.stop] for plane in pages]

    def write(self, tokens: int) -> None:
        """Puts the first tokens' KV into the paged cache, as if they had been computed."""
        for layer, right in enumerate(prefill(self.model, PROMPT)):
            pages = Pages.of(self.caches[layer], self.geometry, self.layout)
            for held, plane in zip(pages, right, strict=True):
                of = torch.tensor(self.pages[: tokens // BLOCK], dtype=torch.int64)
                held[of] = plane[:tokens].view(-1, *held.shape[1:])

    def close(self) -> None:
        self.places.close()


KINDS = ["nhd", "nhd_paged", "vllm_cpu", "packed"]
NOTHING_ANEW = Recipe((1,), (0.0,), head_tokens=0)


@pytest.mark.parametrize(("start", "computed"), [(0, 0), (24, 0), (24, 16), (24, 24), (40, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_computed_is_a_prefill(kind: str, start: int, computed: int) -> None:
    rig = Rig(kind, Recipe((1,), (1.0,)))
    rig.write(computed)
    others = sorted(set(range(len(rig.pages) + 2)) - set(rig.pages))
    before = [Pages.of(cache, rig.geometry, rig.layout).values[others].clone() for cache in rig.caches]
    assert rig.blender.run(rig.order(start, computed)).exception() is None
    for layer, right in enumerate(prefill(rig.model, PROMPT)):
        for found, plane in zip(rig.planes(layer), right, strict=True):
            torch.testing.assert_close(found, plane[: rig.stop], rtol=1e-5, atol=1e-5)
        assert torch.equal(Pages.of(rig.caches[layer], rig.geometry, rig.layout).values[others], before[layer])
    rig.close()


def reused_tokens_are_right(rig: Rig, start: int, tolerance: float) -> None:
    """Nothing is computed anew: V is the chunk's behind the prelude, layer 0's K what the prompt has there."""
    order = rig.order(start, 0)
    assert rig.blender.run(order).exception() is None
    right = prefill(rig.model, PROMPT)
    for part in order.parts:
        if part.start < start:
            continue
        piece = next(piece for piece in rig.pieces if piece.start <= part.start < piece.stop)
        alone = prefill(rig.model, np.concatenate([PRELUDE, PROMPT[piece.start : piece.stop]]))
        tokens = slice(part.start, part.stop)
        for layer in range(LAYERS):
            expected = alone[layer][1][part.start - part.origin : part.stop - part.origin]
            torch.testing.assert_close(rig.planes(layer)[1][tokens], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(rig.planes(0)[0][tokens], right[0][0][tokens], rtol=tolerance, atol=tolerance)
    rig.close()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_reused_tokens_at_every_boundary(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    block = chance.choice([1, 2, 8, 16])
    pieces = [Piece(0, chance.randint(0, 3) * block)]
    for least in (1, 1, 17):  # of the last one there is a block
        start = pieces[-1].stop + chance.randint(0, 5)
        pieces.append(Piece(start, start + chance.randint(least, 40)))
    reused_tokens_are_right(Rig(kind, NOTHING_ANEW, pieces, block), pieces[0].stop, 1e-5)


@pytest.mark.parametrize("kind", ["nhd", "vllm_cpu"])
def test_quantized_chunks(kind: str) -> None:
    """What learns a chunk and what reads it agree on rows of 8 bits, whose error is a scale's."""
    pieces = [Piece(0, 32), Piece(35, 90), Piece(93, 141)]
    reused_tokens_are_right(Rig(kind, NOTHING_ANEW, pieces, 16, codec="int8"), 32, 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_fails(kind: str) -> None:
    rig = Rig(kind, Recipe((1,), (0.15,)))
    order = rig.order(24, 0)
    order.parts[-1].rows.pop()
    assert isinstance(rig.blender.run(order).exception(), BlendError)
    order = rig.order(24, 0)
    order.parts[1].home = Home("elsewhere", 1, 1, "gate")
    assert rig.blender.run(order).exception() is not None
    assert rig.blender.run(rig.order(24, 0)).exception() is None
    rig.close()


def test_pages_of_unknown_order_are_refused() -> None:
    with pytest.raises(GeometryError, match="not known"):
        Pages.of(torch.zeros(4, 2, BLOCK, 8), G, Layout())


PACKED = KVGeometry(layers=1, kv_heads=2, head_dim=4, dtype="float16", block_tokens=4)


class Writer:
    """An attention that writes its pages as told."""

    def __init__(self, swapped: bool) -> None:
        self.impl = self
        self._swapped = swapped

    def do_kv_cache_update(self, layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
        assert layer is self
        first, second = (values, keys) if self._swapped else (keys, values)
        both = torch.cat([first, second], dim=-1)
        for i, slot in enumerate(slots.tolist()):
            cache[slot // PACKED.block_tokens, :, slot % PACKED.block_tokens] = both[i]


def test_the_order_in_a_page_is_proved_or_refused() -> None:
    cache = torch.rand(3, PACKED.kv_heads, PACKED.block_tokens, 2 * PACKED.head_dim).half()
    before = cache.clone()
    prove_order(cache, PACKED, Writer(swapped=False))
    with pytest.raises(GeometryError, match="order of values"):
        prove_order(cache, PACKED, Writer(swapped=True))
    with pytest.raises(GeometryError, match="order of values"):
        prove_order(cache, PACKED, SimpleNamespace(impl=None))
    assert torch.equal(cache, before)
