"""The worker's side of blending on paged caches of every order, against plain prefill."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cairn.blend import BlendError, Piece, Recipe
from cairn.connect.hf_blend import HfBlendModel
from cairn.connect.vllm.blender import Blender, Pages, prove_order
from cairn.connect.vllm.messages import Blend, Learn, Part
from cairn.connect.vllm.movers import mover_for
from cairn.connect.vllm.places import Places
from cairn.errors import GeometryError
from cairn.kv import KVGeometry, Layout
from cairn.node.base import Home
from cairn.tier.arena import Arena
from tests.blend.rig import LAYERS, model_of, prefill, tokens_of

BLOCK, PAGES = 8, 40
G = KVGeometry(layers=LAYERS, kv_heads=2, head_dim=8, dtype="float32", block_tokens=BLOCK)
PROMPT = tokens_of(1, 200)
PRELUDE = tokens_of(9, 3)
#: Chunks of the prompt, at any alignment, and where each begins; the first is its prefix.
PIECES = [Piece(0, 24), Piece(27, 67), Piece(70, 126), Piece(126, 158)]
STOP = 158


class Rig:
    """A blender, its pages in random order and all full of noise, and an arena with every chunk."""

    def __init__(self, kind: str, recipe: Recipe) -> None:
        shapes = {
            "nhd": (2, PAGES, BLOCK, 2, 8),
            "nhd_paged": (PAGES, 2, BLOCK, 2, 8),
            "vllm_cpu": (PAGES, 2, BLOCK, 16),
            "packed": (PAGES, BLOCK, 2, 16),
        }
        self.layout = Layout("vllm_cpu" if kind == "vllm_cpu" else "canonical")
        self.caches = [torch.randn(shapes[kind]) for _ in range(LAYERS)]
        if kind == "packed":  # as FlashAttention's: heads are told before tokens, and stand behind them
            self.caches = [cache.transpose(1, 2) for cache in self.caches]
        self.arena = Arena(32, -(-G.block_bytes // 4096) * 4096)
        self.model = model_of()

        def mover(arena: Arena) -> Any:
            return mover_for(
                self.caches, G, arena.memory[:, : G.block_bytes], arena.memory, threads=1, overlapping=False
            )

        self.places = Places(mover, self.arena)
        model = HfBlendModel(self.model, len(PROMPT))
        self.blender = Blender(model, recipe, G, self.layout, self.caches, self.places, timeout_s=10.0)
        self.pages = np.random.default_rng(2).permutation(PAGES)[: -(-STOP // BLOCK)].tolist()
        self.rows: list[list[int]] = []
        free = iter(np.random.default_rng(3).permutation(32).tolist())
        for number, piece in enumerate(PIECES):
            alone = np.concatenate([PRELUDE if number else PRELUDE[:0], PROMPT[piece.start : piece.stop]])
            self.rows.append([next(free) for _ in range(len(alone) // BLOCK)])
            whole = alone[: len(self.rows[-1]) * BLOCK]
            learned = self.blender.learn(Learn(number, "a", whole.tobytes(), 0, self.rows[-1]))
            assert learned.exception() is None

    def order(self, start: int, computed: int) -> Blend:
        """Blends all but the first piece. start, computed: as in Chunks.order."""
        parts = [Part(computed, start, 0, self.rows[0][computed // BLOCK :])] if start > computed else []
        for piece, rows in zip(PIECES[1:], self.rows[1:], strict=True):
            origin, first = piece.start - len(PRELUDE), max(piece.start, start)
            parts.append(Part(first, origin + len(rows) * BLOCK, origin, rows[(first - origin) // BLOCK :]))
        cut = computed // BLOCK
        return Blend(9, "a", PROMPT[:STOP].tobytes(), start, parts, self.pages[:cut], self.pages[cut:])

    def planes(self, layer: int) -> list[Any]:
        pages = Pages.of(self.caches[layer], G, self.layout)
        return [plane[torch.tensor(self.pages)].flatten(0, 1)[:STOP] for plane in pages]

    def write(self, tokens: int) -> None:
        """Puts the first tokens' KV into the paged cache, as if they had been computed."""
        for layer, right in enumerate(prefill(self.model, PROMPT)):
            pages = Pages.of(self.caches[layer], G, self.layout)
            for held, plane in zip(pages, right, strict=True):
                held[torch.tensor(self.pages[: tokens // BLOCK], dtype=torch.int64)] = plane[:tokens].view(
                    -1, BLOCK, 2, 8
                )

    def close(self) -> None:
        self.places.close()


KINDS = ["nhd", "nhd_paged", "vllm_cpu", "packed"]


@pytest.mark.parametrize(("start", "computed"), [(0, 0), (24, 0), (24, 16), (24, 24), (40, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_all_computed_is_a_prefill(kind: str, start: int, computed: int) -> None:
    rig = Rig(kind, Recipe((1,), (1.0,)))
    rig.write(computed)
    others = sorted(set(range(PAGES)) - set(rig.pages))
    before = [Pages.of(cache, G, rig.layout).values[others].clone() for cache in rig.caches]
    assert rig.blender.run(rig.order(start, computed)).exception() is None
    for layer, right in enumerate(prefill(rig.model, PROMPT)):
        for found, plane in zip(rig.planes(layer), right, strict=True):
            torch.testing.assert_close(found, plane[:STOP], rtol=1e-5, atol=1e-5)
        assert torch.equal(Pages.of(rig.caches[layer], G, rig.layout).values[others], before[layer])
    rig.close()


@pytest.mark.parametrize("kind", KINDS)
def test_reused_tokens_are_those_of_the_chunk_behind_the_prelude(kind: str) -> None:
    rig = Rig(kind, Recipe((1,), (0.0,), head_tokens=0))
    assert rig.blender.run(rig.order(24, 0)).exception() is None
    right = prefill(rig.model, PROMPT)
    for piece, rows in zip(PIECES[1:], rig.rows[1:], strict=True):
        alone = prefill(rig.model, np.concatenate([PRELUDE, PROMPT[piece.start : piece.stop]]))
        tokens = slice(piece.start, piece.start - len(PRELUDE) + len(rows) * BLOCK)
        for layer in range(LAYERS):
            values = rig.planes(layer)[1][tokens]
            torch.testing.assert_close(values, alone[layer][1][len(PRELUDE) : len(rows) * BLOCK], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rig.planes(0)[0][tokens], right[0][0][tokens], rtol=1e-5, atol=1e-5)
    rig.close()


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
        Pages.of(torch.zeros(PAGES, 2, BLOCK, 8), G, Layout())


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
