"""Attention of some rows, by the CUDA kernel in Triton's interpreter and by torch with masks, against plain softmax."""

import importlib
from typing import Any

import pytest
import torch

from cairn.blend import attend

SHAPES = [(1, 1, 2, 1, 16), (1, 700, 2, 2, 64), (40, 90, 4, 2, 64), (130, 300, 3, 1, 48), (270, 600, 6, 2, 32)]


def case(rows: int, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Any, Any, Any]:
    """Queries, planes that stand in one tensor as a paged cache has them, and positions, all random."""
    generator = torch.Generator().manual_seed(rows)
    queries = torch.randn(rows, heads, dim, generator=generator)
    both = torch.randn(tokens, 2, kv_heads, dim, generator=generator)
    return queries, (both[:, 0], both[:, 1]), torch.randperm(tokens, generator=generator)[:rows].sort().values


def plain(queries: Any, planes: Any, positions: Any) -> Any:
    """Softmax in float64, row by row."""
    out = []
    for query, position in zip(queries.double(), positions.tolist(), strict=True):
        keys, values = (
            plane[: position + 1].double().repeat_interleave(len(query) // plane.shape[1], 1) for plane in planes
        )
        scores = torch.einsum("hd,thd->ht", query, keys) * query.shape[1] ** -0.5
        out.append(torch.einsum("ht,thd->hd", scores.softmax(1), values))
    return torch.stack(out)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_looks_at_what_stands_before_it(shape: tuple[int, ...]) -> None:
    queries, planes, positions = case(*shape)
    found = attend(queries, planes, positions, shape[-1] ** -0.5)
    torch.testing.assert_close(found.double(), plain(queries, planes, positions), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_does_so_too(shape: tuple[int, ...], dtype: Any, error: float) -> None:
    pytest.importorskip("triton")
    queries, planes, positions = case(*shape)
    low = queries.to(dtype), *(plane.to(dtype) for plane in planes)
    expected = plain(low[0], low[1:], positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are decorated, and where they call others
        kernel = importlib.import_module("cairn.blend.triton_attention")
        found = kernel.attend(*low, positions, shape[-1] ** -0.5)
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)
