"""Chunks in a real engine: found by their tokens alone, and only where everything else is equal too."""

from typing import Any

import numpy as np
import pytest
import torch

from cairn.blend import ChunkStore, Found, Piece, Rope
from cairn.config import load_config
from cairn.connect.hf_blend import rope_of
from cairn.connect.transformers import namespace_of
from cairn.copy import PagedKV
from cairn.engine import CacheEngine
from cairn.kv import Namespace
from tests.blend.rig import LAYERS, model_of, prefill, tokens_of

BLOCK = 4
MODEL = model_of()
ROPE = rope_of(MODEL)


def namespace(**changes: Any) -> Namespace:
    fields = {"name": "m", "revision": "1", "block_tokens": BLOCK, **changes}
    lora = fields.pop("lora", "")
    found = namespace_of(MODEL, **fields)
    return Namespace(**{**{f: getattr(found, f) for f in found.__struct_fields__}, "lora": lora})


def engine_of(**changes: Any) -> CacheEngine:
    overrides = {"engine.planner": False, "engine.copy_threads": 1, "storage.cpu.size": 1 << 20}
    return CacheEngine(
        namespace(**changes), load_config(environ={}, overrides={**overrides, "engine.block_tokens": BLOCK})
    )


def paged(engine: CacheEngine, planes: list[Any]) -> PagedKV:
    return PagedKV.from_tensors([(k[None], v[None]) for k, v in planes], "nhd", engine.geometry)


def put(store: ChunkStore, tokens: Any) -> None:
    planes = [(k.contiguous(), v.contiguous()) for k, v in prefill(MODEL, np.concatenate([store.prelude, tokens]))]
    store.store(store.chain(tokens), paged(store.engine, planes))


def loaded(store: ChunkStore, found: Found, length: int) -> list[Any]:
    g = store.engine.geometry
    planes = [tuple(torch.zeros(length, g.kv_heads, g.head_dim) for _ in range(2)) for _ in range(LAYERS)]
    canvas = found.load(paged(store.engine, planes), planes.__getitem__, ROPE)
    return [canvas.load(layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 31])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("prelude", [0, 3])
def test_every_boundary(length: int, at: int, prelude: int) -> None:
    """A chunk's whole blocks come to wherever it stands, turned; the rest of it is left to be computed."""
    chunk = tokens_of(1, length)
    prompt = np.concatenate([tokens_of(2, at), chunk, tokens_of(3, 5)])
    piece, whole = Piece(at, at + length), length // BLOCK * BLOCK
    with engine_of() as engine:
        store = ChunkStore(engine, ROPE, tokens_of(9, prelude))
        put(store, chunk)
        with store.find(prompt, [piece], 0) as found:
            held = Piece(at, at + whole)
            assert found.held == ([held] if whole else [])
            exact = at == prelude == 0
            assert found.reused == ([held] if whole and not exact else [])
            assert found.start == (whole if exact else 0)
            assert not found.missing
            planes = loaded(store, found, len(prompt))
        # Layer 0 knows no context: there a turned key is the one that the model computes at this position.
        right = prefill(MODEL, prompt)[0]
        for plane, expected in zip(planes[0], right, strict=True):
            torch.testing.assert_close(plane[at : at + whole], expected[at : at + whole], rtol=1e-5, atol=1e-5)
        assert not any(plane[:at].any() or plane[at + whole :].any() for layer in planes for plane in layer)


@pytest.mark.parametrize("start", range(8, 22))
def test_behind_a_prefix(start: int) -> None:
    """What the prefix holds is neither loaded nor counted."""
    chunk = tokens_of(1, 12)
    prompt = np.concatenate([tokens_of(2, 9), chunk, tokens_of(3, 5)])
    with engine_of() as engine:
        store = ChunkStore(engine, ROPE)
        put(store, chunk)
        with store.find(prompt, [Piece(9, 21)], start) as found:
            first = max(start, 9)
            assert found.reused == ([Piece(first, 21)] if first < 21 else [])
            planes = loaded(store, found, len(prompt)) if found.reused else []
        right = prefill(MODEL, prompt)[0][0]
        for layer in planes[:1]:
            torch.testing.assert_close(layer[0][first:21], right[first:21], rtol=1e-5, atol=1e-5)
            assert not layer[0][:first].any()
        hits, lookups = engine.metrics.blend_hits, engine.metrics.blend_lookups
        for counter in (hits, lookups):
            assert counter.value(unit="chunks") == (first < 21)
            assert counter.value(unit="tokens") == max(0, 21 - first)


def test_what_is_missing() -> None:
    """A chunk that is held in part is reused in part, and named as missing; of one without a block nothing can be."""
    known, new = tokens_of(1, 16), tokens_of(2, 10)
    prompt = np.concatenate([tokens_of(3, 3), known, new, tokens_of(4, 2)])
    with engine_of() as engine:
        store = ChunkStore(engine, ROPE)
        put(store, known[:9])
        with store.find(prompt, [Piece(3, 19), Piece(19, 29), Piece(29, 31)], 0) as found:
            assert found.reused == [Piece(3, 11)]
            assert found.missing == [Piece(3, 19), Piece(19, 29)]
        assert engine.metrics.blend_lookups.value(unit="chunks") == 3
        assert engine.metrics.blend_hits.value(unit="chunks") == 1


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"name": "other"}, ROPE),
        ({"revision": "2"}, ROPE),
        ({"salt": b"tenant"}, ROPE),
        ({"lora": "adapter@1"}, ROPE),
        ({}, ROPE._replace(scaling=1.1)),
        ({}, ROPE._replace(interleaved=True)),
        ({}, Rope(ROPE.frequencies * np.float32(0.5))),
        ({}, Rope(np.nextafter(ROPE.frequencies, np.float32(2)))),
    ],
)
def test_another_models_chunks_are_never_found(changes: dict[str, Any], rope: Rope) -> None:
    """Same text, same engine, same tiers: another model, revision, tenant, adapter or RoPE has other keys."""
    chunk = tokens_of(1, 12)
    with engine_of() as engine, engine_of(**changes) as other:
        store = ChunkStore(engine, ROPE)
        put(store, chunk)
        chain = ChunkStore(other, rope).chain(chunk)
        assert engine.lookup(store.chain(chunk)) == 12
        assert engine.lookup(chain) == 0
        assert engine.lookup(ChunkStore(engine, ROPE, tokens_of(9, 1)).chain(chunk)) == 0


def test_chunks_and_prefixes_are_never_taken_for_each_other() -> None:
    chunk = tokens_of(1, 12)
    with engine_of() as engine:
        store = ChunkStore(engine, ROPE)
        put(store, chunk)
        assert engine.lookup(chunk) == 0
        planes = [(k.contiguous(), v.contiguous()) for k, v in prefill(MODEL, tokens_of(2, 12))]
        engine.store(tokens_of(2, 12), kvcaches=paged(engine, planes), slot_mapping=np.arange(12))
        assert engine.lookup(store.chain(tokens_of(2, 12))) == 0
