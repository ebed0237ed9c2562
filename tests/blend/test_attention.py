"""Attention of some rows, by the CUDA kernel in Triton's interpreter and by torch with masks, against plain softmax."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cairn.blend import attend

SHAPES = [(1, 1, 2, 1, 16), (1, 300, 2, 2, 64), (40, 90, 4, 2, 64), (100, 170, 3, 1, 48)]


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


def check_the_kernel() -> None:
    """All shapes, in a process that interprets kernels from the start: triton's own, like `tl.max`, are some too."""
    from cairn.blend.triton_attention import attend as kernel

    for shape in SHAPES:
        queries, planes, positions = case(*shape)
        for dtype, error in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
            low = queries.to(dtype), *(plane.to(dtype) for plane in planes)
            found = kernel(*low, positions, shape[-1] ** -0.5)
            torch.testing.assert_close(found.double(), plain(low[0], low[1:], positions), rtol=error, atol=error)


def test_the_kernel_does_so_too() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "from tests.blend.test_attention import check_the_kernel as go; go()"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
