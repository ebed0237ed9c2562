"""The forward pass that blends, on models of every family, against plain prefill."""

from typing import Any

import numpy as np
import pytest
import torch

from cairn.blend import Piece, Recipe, Turn, blend
from cairn.connect.hf_blend import HfBlendModel
from cairn.errors import InputError
from tests.blend.rig import LAYERS, Memory, model_of, prefill, tokens_of

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def ids(tokens: Any) -> Any:
    return torch.from_numpy(tokens.astype(np.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_reused_is_a_prefill_bit_for_bit(family: str) -> None:
    model, tokens = model_of(family), tokens_of(1, 333)
    expected = prefill(model, tokens)
    canvas = Memory.empty(expected)
    assert blend(HfBlendModel(model, 333), ids(tokens), canvas, 0, [], Recipe()) == [333] * LAYERS
    for found, right in zip(canvas.planes, expected, strict=True):
        assert torch.equal(found[0], right[0])
        assert torch.equal(found[1], right[1])
    assert canvas.order == [(what, layer) for layer in range(LAYERS) for what in ("load", "finish")]


def wrong_chunks(right: list[Any], pieces: list[Piece]) -> Memory:
    """A canvas with noise where chunks are reused: what is computed anew must not depend on it."""
    canvas = Memory.empty(right)
    for planes in canvas.planes:
        for piece in pieces:
            for plane in planes:
                plane[piece.start : piece.stop] = torch.randn(piece.stop - piece.start, *plane.shape[1:])
    return canvas


@pytest.mark.parametrize("start", [0, 1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_one_is_a_prefill(family: str, start: int) -> None:
    """Bit for bit where the whole prompt is computed; behind a prefix to 1e-5, as there the masks differ."""
    model, tokens = model_of(family), tokens_of(2, 300)
    expected = prefill(model, tokens)
    pieces = [Piece(40, 41), Piece(50, 200), Piece(220, 290)]
    canvas = wrong_chunks(expected, pieces)
    for planes, right in zip(canvas.planes, expected, strict=True):
        planes[0][:start], planes[1][:start] = right[0][:start], right[1][:start]
    counts = blend(HfBlendModel(model, 300), ids(tokens), canvas, start, pieces, Recipe((1,), (1.0,)))
    assert counts == [300 - start] * LAYERS
    for planes, right in zip(canvas.planes, expected, strict=True):
        for found, plane in zip(planes, right, strict=True):
            if start == 0:
                assert torch.equal(found, plane)
            torch.testing.assert_close(found, plane, rtol=1e-5, atol=1e-5)


def test_right_chunks_give_the_right_kv() -> None:
    """Chunks whose KV is what the prompt gives them: whatever is computed anew, nothing changes."""
    model, tokens = model_of(), tokens_of(3, 200)
    expected = prefill(model, tokens)
    pieces = [Piece(30, 90), Piece(90, 91), Piece(100, 180)]
    for recipe in (Recipe((1,), (0.0,), 0), Recipe((1,), (0.2,), 3), Recipe((1, 2), (0.5, 0.1), 0)):
        canvas = Memory.empty(expected)
        for planes, right in zip(canvas.planes, expected, strict=True):
            for piece in pieces:
                for plane, good in zip(planes, right, strict=True):
                    plane[piece.start : piece.stop] = good[piece.start : piece.stop]
        blend(HfBlendModel(model, 200), ids(tokens), canvas, 0, pieces, recipe)
        for planes, right in zip(canvas.planes, expected, strict=True):
            for found, plane in zip(planes, right, strict=True):
                torch.testing.assert_close(found, plane, rtol=1e-5, atol=1e-5)


def test_how_many_tokens_each_layer_computes() -> None:
    model, tokens = model_of(), tokens_of(4, 200)
    pieces = [Piece(20, 70), Piece(80, 130)]
    right = prefill(model, tokens)

    def counts(recipe: Recipe) -> list[int]:
        return blend(HfBlendModel(model, 200), ids(tokens), wrong_chunks(right, pieces), 0, pieces, recipe)

    assert counts(Recipe((1,), (0.0,), 0)) == [100, 100, 100]
    assert counts(Recipe((1,), (0.0,), 4)) == [108, 108, 108]
    assert counts(Recipe((1, 2), (0.3, 0.1), 4)) == [200, 138, 118]
    with pytest.raises(InputError, match="the model has layers 0"):
        counts(Recipe((3,), (0.1,)))


def test_more_is_closer() -> None:
    """Of chunks that were computed alone and turned, the error of a prompt's KV falls as more is computed anew."""
    model = model_of()
    pieces = [Piece(10, 90), Piece(95, 190)]
    tokens = tokens_of(5, 220)
    right = prefill(model, tokens)
    errors = []
    for recipe in (Recipe((1,), (0.0,), 0), Recipe((1,), (0.3,)), Recipe((1,), (0.7,)), Recipe((1,), (1.0,))):
        canvas = Memory.empty(right)
        forward = HfBlendModel(model, 220)
        for piece in pieces:
            to = torch.arange(piece.start, piece.stop)
            turn = Turn.between(forward.rope, to - piece.start, forward.rope, to)
            for planes, alone in zip(canvas.planes, prefill(model, tokens[piece.start : piece.stop]), strict=True):
                planes[0][to], planes[1][to] = alone
                turn.apply(planes[0], to)
        blend(forward, ids(tokens), canvas, 0, pieces, recipe)
        errors.append(float((canvas.planes[-1][1] - right[-1][1]).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
