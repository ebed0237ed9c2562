"""Chunks in a real engine: found by their tokens alone, and only where everything else is equal too."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cairn.blend import ChunkStore, Found, Piece, Rope
from cairn.config import load_config
from cairn.connect.hf_blend import rope_of
from cairn.connect.transformers import namespace_of
from cairn.copy import PagedKV
from cairn.engine import CacheEngine
from cairn.kv import Namespace
from tests.blend.rig import LAYERS, model_of, prefill, tokens_of

BLOCK = 4
SCALED = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128}
MODELS = {
    kind: model_of(rope_parameters={"rope_type": kind, **SCALED, **more})
    for kind, more in {
        "default": {},
        "linear": {},
        "yarn": {},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }.items()
}
MODEL = MODELS["default"]
ROPE = rope_of(MODEL)


def namespace(**changes: Any) -> Namespace:
    fields = {"name": "m", "revision": "1", "block_tokens": BLOCK, **changes}
    lora = fields.pop("lora", "")
    found = namespace_of(MODEL, **fields)
    return Namespace(**{**{f: getattr(found, f) for f in found.__struct_fields__}, "lora": lora})


def engine_of(**changes: Any) -> CacheEngine:
    overrides = {"engine.planner": False, "engine.copy_threads": 1, "storage.cpu.size": 1 << 20}
    block = changes.get("block_tokens", BLOCK)
    return CacheEngine(
        namespace(**changes), load_config(environ={}, overrides={**overrides, "engine.block_tokens": block})
    )


def paged(engine: CacheEngine, planes: list[Any]) -> PagedKV:
    return PagedKV.from_tensors([(k[None], v[None]) for k, v in planes], "nhd", engine.geometry)


def put(store: ChunkStore, tokens: Any, model: Any = MODEL) -> None:
    planes = [(k.contiguous(), v.contiguous()) for k, v in prefill(model, np.concatenate([store.prelude, tokens]))]
    store.store(store.chain(tokens), paged(store.engine, planes))


def loaded(store: ChunkStore, found: Found, length: int) -> list[Any]:
    g = store.engine.geometry
    planes = [tuple(torch.zeros(length, g.kv_heads, g.head_dim) for _ in range(2)) for _ in range(LAYERS)]
    canvas = found.load(paged(store.engine, planes), planes.__getitem__, store.rope)
    return [canvas.load(layer) for layer in range(LAYERS)]


@given(
    kind=st.sampled_from(sorted(MODELS)),
    block=st.sampled_from([1, 2, 4, 16]),
    prelude=st.integers(0, 5),
    chunks=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=4),
    start=st.integers(0, 60),
)
@example(kind="default", block=1, prelude=1, chunks=[(3, 1), (0, 1), (2, 1)], start=0)
@settings(max_examples=40, deadline=None)
def test_every_boundary(kind: str, block: int, prelude: int, chunks: list[tuple[int, int]], start: int) -> None:
    """Of each chunk, (tokens before it, its own), its whole blocks behind `start` come to where it stands, turned. The
    rest of it is left to be computed, and nothing else is touched, loaded or counted.
    """
    model, tokens = MODELS[kind], tokens_of(1, 2 + sum(map(sum, chunks)))
    stops = np.cumsum([sum(chunk) for chunk in chunks]).tolist()
    pieces = [Piece(stop - length, stop) for stop, (_, length) in zip(stops, chunks, strict=True)]
    wanted = [piece for piece in pieces if piece.stop > start]
    whole = [Piece(max(a, start), a + (b - a) // block * block) for a, b in pieces]
    whole = [piece for piece in whole if piece.start < piece.stop]
    with engine_of(block_tokens=block) as engine:
        store = ChunkStore(engine, rope_of(model), tokens_of(9, prelude))
        for first, stop in pieces:
            put(store, tokens[first:stop], model)
        with store.find(tokens, pieces, start) as found:
            assert found.reused == whole
            assert not found.missing
            planes = loaded(store, found, len(tokens))
        for counter, some in ((engine.metrics.blend_lookups, wanted), (engine.metrics.blend_hits, whole)):
            assert counter.value(unit="chunks") == len(some)
            assert counter.value(unit="tokens") == sum(stop - max(first, start) for first, stop in some)
    # Layer 0 knows no context: there a turned key is the one that the model computes at this position.
    there = np.zeros(len(tokens), np.bool_)
    for first, stop in whole:
        there[first:stop] = True
    for plane, right in zip(planes[0], prefill(model, tokens)[0], strict=True):
        torch.testing.assert_close(plane[there], right[there], rtol=1e-5, atol=1e-5)
    assert not any(plane[~there].any() for layer in planes for plane in layer)


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
