"""Rows of engines with any degree of parallelism, made number by number."""

from itertools import accumulate, product
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from cairn.kv import KVGeometry, Layout, Part

_WORDS = {"float32": np.uint32, "bfloat16": np.uint16}


def row_of(geometry: KVGeometry, layout: Layout, block: int) -> npt.NDArray[np.uint8]:
    """The row, uint8 [block_bytes], of block number `block`, whose values tell where in the model they stand."""
    g = geometry
    values: list[int] = []
    for part in layout.parts or (Part(0, g.layers, 0, g.kv_heads),):
        layers = range(part.first_layer, part.first_layer + part.layers)
        heads = range(part.first_head, part.first_head + part.heads)
        tokens, dims = range(g.block_tokens), range(g.head_dim)
        for layer in layers:
            if layout.page == "canonical":
                places = [(p, t, h, d) for p, t, h, d in product(range(g.planes), tokens, heads, dims)]
            else:
                places = []
                for h in heads:
                    places += [(0, t, h, d) for d, t in product(dims, tokens)]
                    places += [(1, t, h, d) for t, d in product(tokens, dims)]
            values += [_value(g, block, layer, *place) for place in places]
    return np.array(values, np.uint64).astype(_WORDS[g.dtype]).view(np.uint8)


def _value(g: KVGeometry, block: int, layer: int, plane: int, token: int, head: int, dim: int) -> int:
    sizes = (g.layers, g.planes, g.block_tokens, g.kv_heads, g.head_dim)
    number = block
    for size, at in zip(sizes, (layer, plane, token, head, dim), strict=True):
        number = number * size + at
    return number


def parallel(geometry: KVGeometry, tensor: int, stages: list[int], page: Any = "canonical") -> Layout:
    """The layout of `tensor` ranks in each of stages with so many layers."""
    heads = geometry.kv_heads // tensor
    firsts = [0, *accumulate(stages)]
    parts = tuple(
        Part(first, layers, rank * heads, heads)
        for first, layers in zip(firsts, stages, strict=False)
        for rank in range(tensor)
    )
    return Layout.of(page, parts, geometry)


@st.composite
def geometries(draw: st.DrawFn) -> KVGeometry:
    return KVGeometry(
        layers=draw(st.integers(1, 4)),
        kv_heads=draw(st.sampled_from([1, 2, 3, 4, 8])),
        head_dim=draw(st.integers(1, 4)),
        block_tokens=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(sorted(_WORDS))),
    )


@st.composite
def layouts(draw: st.DrawFn, geometry: KVGeometry) -> Layout:
    """Any degree of tensor and pipeline parallelism that the geometry allows, in any page order."""
    tensor = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if geometry.kv_heads % n == 0]))
    stages: list[int] = []
    while sum(stages) < geometry.layers:
        stages.append(draw(st.integers(1, geometry.layers - sum(stages))))
    return parallel(geometry, tensor, stages, draw(st.sampled_from(["canonical", "vllm_cpu"])))
