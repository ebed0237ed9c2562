"""What the CUDA copier is made of, without a GPU: its planner, and its kernel in Triton's interpreter."""

import ctypes
import importlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.copy import CpuCopier, PagedKV
from cairn.copy.pieces import merge, piece_bytes, plan, vector_shape, whole_blocks, word_bytes
from cairn.errors import InputError
from cairn.kv import KVGeometry

PAGES = 6


def cache(layout: str, g: KVGeometry, page_tokens: int, rng: np.random.Generator) -> list[npt.NDArray[np.uint16]]:
    shapes = {
        "nhd": (2, PAGES, page_tokens, g.kv_heads, g.head_dim),
        "nhd_paged": (PAGES, 2, page_tokens, g.kv_heads, g.head_dim),
        "hnd": (2, PAGES, g.kv_heads, page_tokens, g.head_dim),
        "mla": (PAGES, page_tokens, g.head_dim),
        "cross_layer": (PAGES, g.layers, 2, page_tokens, g.kv_heads, g.head_dim),
    }
    count = 1 if layout == "cross_layer" else g.layers
    return [rng.integers(0, 1 << 16, shapes[layout], dtype=np.uint16) for _ in range(count)]


def geometry(layout: str, block: int, dim: int) -> KVGeometry:
    if layout == "mla":
        return KVGeometry(layers=3, kv_heads=1, head_dim=dim, block_tokens=block, planes=1)
    return KVGeometry(layers=3, kv_heads=2, head_dim=dim, block_tokens=block)


def case(layout: str, block: int, dim: int, holes: bool, seed: int):  # type: ignore[no-untyped-def]
    """(geometry, tensors, slots, memory, rows), all random."""
    rng = np.random.default_rng(seed)
    g = geometry(layout, block, dim)
    tensors = cache(layout, g, 4, rng)
    blocks = PAGES * 4 // block - 1
    slots = rng.permutation(PAGES * 4)[: blocks * block] if seed % 2 else np.arange(blocks * block)
    if holes:
        slots = np.where(rng.random(len(slots)) < 0.3, -1, slots)
    memory = rng.integers(0, 256, (blocks + 1, g.block_bytes + 64), dtype=np.uint8)
    return g, tensors, slots.astype(np.int64), memory, rng.permutation(blocks + 1)[:blocks].astype(np.int32)


CASES = {
    "layout": st.sampled_from(["nhd", "nhd_paged", "hnd", "mla", "cross_layer"]),
    "block": st.sampled_from([1, 3, 4, 8]),
    "dim": st.sampled_from([1, 8, 20]),
    "holes": st.booleans(),
    "layers": st.sampled_from([range(3), range(1, 2), range(1, 3)]),
    "into_rows": st.booleans(),
    "seed": st.integers(0, 1 << 30),
}


@settings(max_examples=80, deadline=None)
@given(**CASES)
def test_planned_pieces_copy_what_the_cpu_copier_copies(
    layout: str, block: int, dim: int, holes: bool, layers: range, into_rows: bool, seed: int
) -> None:
    g, tensors, slots, memory, rows = case(layout, block, dim, holes, seed)
    kv = PagedKV.from_tensors(tensors, layout, g)
    pieces = plan(kv, slots, memory.ctypes.data + rows.astype(np.int64) * memory.strides[0], layers, g)
    before = [tensor.copy() for tensor in tensors], memory.copy()
    run = CpuCopier(g).gather if into_rows else CpuCopier(g).scatter
    run(kv, slots, memory, rows, layers)
    expected = [tensor.copy() for tensor in tensors], memory.copy()
    for tensor, old in zip([*tensors, memory], [*before[0], before[1]], strict=True):
        tensor[...] = old
    for outside, inside, size in zip(*(part.tolist() for part in pieces), strict=True):
        ctypes.memmove(*((inside, outside) if into_rows else (outside, inside)), size)
    assert all((a == b).all() for a, b in zip(tensors, expected[0], strict=True))
    assert (memory == expected[1]).all()


@settings(max_examples=15, deadline=None)
@given(**CASES)
def test_the_kernel_copies_what_the_cpu_copier_copies(
    layout: str, block: int, dim: int, holes: bool, layers: range, into_rows: bool, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
        kernel = importlib.import_module("cairn.copy.triton_kernel")
    g, tensors, slots, memory, rows = case(layout, block, dim, holes, seed)
    rows = np.arange(1, len(rows) + 1, dtype=np.int32)  # staged rows stand one behind the other
    kv = PagedKV.from_tensors(tensors, layout, g)
    first = memory[1:].ctypes.data + layers.start * g.layer_bytes
    before = [tensor.copy() for tensor in tensors], memory.copy()
    run = CpuCopier(g).gather if into_rows else CpuCopier(g).scatter
    run(kv, slots, memory, rows, layers)
    expected = [tensor.copy() for tensor in tensors], memory.copy()
    for tensor, old in zip([*tensors, memory], [*before[0], before[1]], strict=True):
        tensor[...] = old
    heads, head_bytes = vector_shape(kv, g)
    kernel.move(
        torch.from_numpy(kv.bases[layers.start : layers.stop].reshape(-1).copy()),
        torch.from_numpy(slots),
        first,
        blocks=len(rows),
        strides=(kv.page_stride, kv.token_stride, kv.head_stride, memory.strides[0]),
        page_tokens=kv.page_tokens,
        block_tokens=g.block_tokens,
        heads=heads,
        head_bytes=head_bytes,
        word=word_bytes(kv, np.array([first, memory.strides[0]]), g),
        programs=2,
        into_rows=into_rows,
    )
    assert all((a == b).all() for a, b in zip(tensors, expected[0], strict=True))
    assert (memory == expected[1]).all()


@settings(max_examples=300, deadline=None)
@given(
    layout=st.sampled_from(["nhd", "hnd", "mla", "cross_layer", "vllm"]),
    block=st.sampled_from([1, 2, 4, 8]),
    layers=st.sampled_from([range(3), range(1, 2), range(1, 3)]),
    firsts=st.lists(st.integers(-1, 26), max_size=5),
    spoilt=st.none() | st.tuples(st.integers(0, 39), st.integers(-2, 30)),
)
def test_whole_blocks_are_what_is_planned_and_checked(
    layout: str, block: int, layers: range, firsts: list[int], spoilt: tuple[int, int] | None
) -> None:
    """Joined they are the plan, and they are found wherever pages that are one run are moved as they are."""
    g = geometry(layout, block, 8)
    shape = (PAGES, g.kv_heads, block, 2 * 8)
    vllm = layout == "vllm"
    tensors = [np.zeros(shape, np.uint16) for _ in range(3)] if vllm else cache(layout, g, 4, np.random.default_rng(0))
    kv = PagedKV.from_tensors(tensors, layout, g)
    slots = (np.array(firsts, np.int64)[:, None] + np.arange(block)).reshape(-1)
    if spoilt and spoilt[0] < len(slots):
        slots[spoilt[0]] = spoilt[1]
    rows = np.arange(len(firsts), dtype=np.int32)[::-1].copy()
    found = whole_blocks(kv, slots, (1000, g.block_bytes + 64), rows, layers, g)
    try:
        kv.check_slots(slots, block)
    except InputError:
        assert found is None
        return
    starts = 1000 + rows.astype(np.int64) * (g.block_bytes + 64)
    if found:
        assert found.sizes.tolist() == [len(layers) * g.layer_bytes] * len(rows)
        joined, planned = merge(*found), plan(kv, slots, starts, layers, g)
        assert all((a == b).all() for a, b in zip(joined, planned, strict=True))
    in_pages = [first >= 0 and first % 4 <= 4 - block for first in firsts]
    assert found or spoilt or layout != "cross_layer" or block != 4 or not all(in_pages)


def test_a_page_across_all_layers_is_one_piece() -> None:
    g = geometry("cross_layer", 4, 8)
    kv = PagedKV.from_tensors(cache("cross_layer", g, 4, np.random.default_rng(0)), "cross_layer", g)
    slots = np.array([8, 9, 10, 11, 0, 1, 2, 3])
    starts = np.array([0, g.block_bytes])
    assert plan(kv, slots, starts, range(3), g).sizes.tolist() == [g.block_bytes] * 2
    assert plan(kv, np.arange(8), starts, range(3), g).sizes.tolist() == [2 * g.block_bytes]
    assert plan(kv, slots, starts, range(1, 2), g).sizes.tolist() == [g.layer_bytes] * 2


@pytest.mark.parametrize("layout", ["nhd", "nhd_paged", "hnd", "mla", "cross_layer"])
@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("layers", [range(3), range(1, 2)])
@pytest.mark.parametrize("apart", [False, True])
def test_the_length_of_pieces_is_known_without_a_plan(layout: str, block: int, layers: range, apart: bool) -> None:
    g = geometry(layout, block, 8)
    kv = PagedKV.from_tensors(cache(layout, g, 4, np.random.default_rng(0)), layout, g)
    # Tokens in order in two pages that are no neighbours, or none of them the next one's neighbour.
    slots = np.array([0, 2, 8, 6, 16, 18, 12, 22] if apart else [0, 1, 2, 3, 16, 17, 18, 19])[:block]
    planned = plan(kv, slots, np.zeros(1, np.int64), layers, g)
    assert piece_bytes(kv, slots, layers, g) == planned.sizes[0]


def test_merging_needs_neighbours_on_both_sides() -> None:
    pieces = merge(np.array([0, 8, 16, 32]), np.array([100, 108, 200, 208]), np.full(4, 8))
    assert [part.tolist() for part in pieces] == [[0, 16, 32], [100, 200, 208], [16, 8, 8]]
    empty = np.empty(0, np.int64)
    assert not len(merge(empty, empty, empty).sizes)


def test_the_copy_folder_does_not_bring_torch() -> None:
    import subprocess
    import sys

    check = "import sys, cairn.copy; print('torch' in sys.modules, 'triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["False", "False"]
