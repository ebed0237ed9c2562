"""Copies against plain numpy indexing, in every layout."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.copy import CpuCopier, PagedKV, Progress
from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry

PAGES = 7
LAYOUTS = ("nhd", "nhd_pair", "nhd_paged", "cross_layer", "hnd", "transformers", "mla", "unpacked")


def tensors(layout: str, g: KVGeometry, page_tokens: int, rng: np.random.Generator) -> tuple[list[Any], str]:
    """A paged cache of random bytes in a layout, and the layout's name for `from_tensors`."""

    def random(*shape: int) -> npt.NDArray[np.uint16]:
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16)

    nhd = (PAGES, page_tokens, g.kv_heads, g.head_dim)
    hnd = (PAGES, g.kv_heads, page_tokens, g.head_dim)
    if layout == "nhd":
        return [random(2, *nhd) for _ in range(g.layers)], "nhd"
    if layout == "nhd_pair":
        return [(random(*nhd), random(*nhd)) for _ in range(g.layers)], "nhd"
    if layout == "nhd_paged":
        return [random(PAGES, 2, *nhd[1:]) for _ in range(g.layers)], "nhd_paged"
    if layout == "cross_layer":
        return [random(PAGES, g.layers, 2, *nhd[1:])], "cross_layer"
    if layout == "hnd":
        return [random(2, *hnd) for _ in range(g.layers)], "hnd"
    if layout == "transformers":
        shape = (1, g.kv_heads, PAGES * page_tokens, g.head_dim)
        return [(random(*shape), random(*shape)) for _ in range(g.layers)], "transformers"
    if layout == "mla":
        return [random(PAGES, page_tokens, g.head_dim) for _ in range(g.layers)], "mla"
    wide = (PAGES, page_tokens + 1, g.kv_heads + 1, g.head_dim)
    return [random(2, *wide)[:, :, 1:, :-1] for _ in range(g.layers)], "nhd"


def vectors(entries: list[Any], layout: str, g: KVGeometry, slot: int, page_tokens: int) -> npt.NDArray[np.uint16]:
    """The oracle: token `slot` as [layer, plane, head, dim]."""
    page, offset = divmod(slot, page_tokens)
    found = np.empty((g.layers, g.planes, g.kv_heads, g.head_dim), np.uint16)
    for layer in range(g.layers):
        entry = entries[0][:, layer] if layout == "cross_layer" else entries[layer]
        for plane in range(g.planes):
            whole = entry if layout == "mla" else entry[plane]
            if layout == "transformers":
                found[layer, plane] = whole[0, :, slot]
            elif layout in ("nhd_paged", "cross_layer"):
                found[layer, plane] = entry[page, plane, offset]
            elif layout == "hnd":
                found[layer, plane] = whole[page, :, offset]
            else:
                found[layer, plane] = whole[page, offset]
    return found


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 8, 40, 128]),
    block=st.sampled_from([1, 3, 16]),
    page_tokens=st.sampled_from([4, 16]),
    shape=st.sampled_from(["runs", "scattered", "gaps"]),
    threads=st.sampled_from([1, 2]),
    followed=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_gather_and_scatter_equal_indexing(
    layout: str, heads: int, dim: int, block: int, page_tokens: int, shape: str, threads: int, followed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    planes = 1 if layout == "mla" else 2
    heads = 1 if layout == "mla" else heads
    g = KVGeometry(layers=2, kv_heads=heads, head_dim=dim, block_tokens=block, planes=planes)  # type: ignore[arg-type]
    source, name = tensors(layout, g, page_tokens, rng)
    target, _ = tensors(layout, g, page_tokens, rng)
    untouched, _ = [np.copy(np.asarray(entry)) for entry in target], None
    blocks = max(1, min(5, PAGES * page_tokens // block - 1))
    order = rng.permutation(PAGES * page_tokens)[: blocks * block]
    slots = np.sort(order) if shape == "runs" else order
    if shape == "gaps":
        slots = np.where(rng.random(len(slots)) < 0.3, -1, slots)
    memory = np.zeros((blocks + 2, g.block_bytes + 64), np.uint8)
    rows = rng.permutation(blocks + 2)[:blocks].astype(np.int32)
    copier = CpuCopier(g, threads)

    copier.gather(PagedKV.from_tensors(source, name, g), slots, memory, rows)
    for i, row in enumerate(rows):
        stored = memory[row, : g.block_bytes].view(np.uint16).reshape(g.block_shape)
        for t in range(block):
            slot = int(slots[i * block + t])
            expected = vectors(source, layout, g, slot, page_tokens) if slot >= 0 else 0
            assert (stored[:, :, t] == expected).all()
    assert (memory[:, g.block_bytes :] == 0).all()

    kv = PagedKV.from_tensors(target, name, g)
    if followed:
        progress = Progress(g.layers)
        copier.scatter_layers(kv, slots, memory, rows, progress)
        assert progress.done == g.layers
    else:
        copier.scatter(kv, slots, memory, rows)
    written = set(slots[slots >= 0].tolist())
    for slot in range(PAGES * page_tokens):
        expected = vectors(source if slot in written else untouched, layout, g, slot, page_tokens)
        assert (vectors(target, layout, g, slot, page_tokens) == expected).all()
    copier.close()


def test_layers_are_copied_one_by_one() -> None:
    g = KVGeometry(layers=3, kv_heads=2, head_dim=8, block_tokens=4)
    rng = np.random.default_rng(0)
    source, name = tensors("nhd", g, 4, rng)
    memory = np.zeros((1, g.block_bytes), np.uint8)
    CpuCopier(g).gather(PagedKV.from_tensors(source, name, g), np.arange(4), memory, np.zeros(1, np.int32), range(1, 2))
    stored = memory.view(np.uint16).reshape(g.block_shape)
    assert (stored[1, :, :4] == source[1][:, 0, :4]).all()
    assert not stored[[0, 2]].any()


def test_a_closed_copier_copies_by_itself() -> None:
    """An engine is closed while another thread copies: what has begun ends, and nothing of it is left to others."""
    g = KVGeometry(layers=1, kv_heads=1, head_dim=4, dtype="float16", block_tokens=2)
    entries, name = tensors("nhd", g, 2, np.random.default_rng(0))
    kv, copier = PagedKV.from_tensors(entries, name, g), CpuCopier(g, 2)
    copier.close()
    slots, memory = np.arange(8, dtype=np.int64), np.zeros((4, g.block_bytes), np.uint8)
    copier.gather(kv, slots, memory, np.arange(4, dtype=np.int32))
    found = memory.view(np.uint16).reshape(4, 2, 2, 4)
    assert (found == entries[0][:, :4].transpose(1, 0, 2, 3, 4).reshape(4, 2, 2, 4)).all()
    copier.close()


def test_opaque_pages_move_whole() -> None:
    g = KVGeometry(layers=2, kv_heads=2, head_dim=8, block_tokens=16)
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 1 << 16, (5, 2, 16, 16), dtype=np.uint16) for _ in range(2)]
    other = [np.zeros_like(page) for page in pages]
    memory = np.zeros((2, g.block_bytes), np.uint8)
    rows = np.array([1, 0], np.int32)
    copier = CpuCopier(g)
    kv = PagedKV.from_tensors(pages, "vllm", g)
    copier.gather(kv, np.concatenate([np.arange(48, 64), np.arange(16)]), memory, rows)
    copier.scatter(PagedKV.from_tensors(other, "vllm", g), np.arange(16, 48), memory, rows)
    assert all((b[1] == a[3]).all() and (b[2] == a[0]).all() for a, b in zip(pages, other, strict=True))
    with pytest.raises(InputError, match="one whole page"):
        copier.gather(kv, np.arange(8, 24), memory, rows[:1])


def test_torch_tensors_of_every_dtype() -> None:
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "float16", "bfloat16"):
        g = KVGeometry(layers=1, kv_heads=2, head_dim=8, block_tokens=4, dtype=dtype)
        kind = getattr(torch, dtype)
        pair = [(torch.randn(1, 2, 8, 8).to(kind), torch.randn(1, 2, 8, 8).to(kind))]
        back = [(torch.zeros(1, 2, 8, 8, dtype=kind), torch.zeros(1, 2, 8, 8, dtype=kind))]
        memory, rows = np.zeros((2, g.block_bytes), np.uint8), np.arange(2, dtype=np.int32)
        copier = CpuCopier(g)
        copier.gather(PagedKV.from_tensors(pair, "transformers", g), np.arange(8), memory, rows)
        copier.scatter(PagedKV.from_tensors(back, "transformers", g), np.arange(8)[::-1].copy(), memory, rows)
        assert torch.equal(back[0][0], pair[0][0].flip(2))
        assert torch.equal(back[0][1], pair[0][1].flip(2))


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("nhd", (2, 4, 16, 3, 8), r"expected \(2, 8\) packed"),
        ("nhd", (2, 4, 16, 2), "has 4 dimensions"),
        ("nhd", (3, 4, 16, 2, 8), "3 planes"),
        ("hnd", (2, 4, 16, 2, 8), r"expected \(2, 8\) packed"),
        ("diagonal", (2, 4, 16, 2, 8), "must be one of"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(layout: str, shape: tuple[int, ...], message: str) -> None:
    g = KVGeometry(layers=1, kv_heads=2, head_dim=8)
    with pytest.raises(GeometryError, match=message):
        PagedKV.from_tensors([np.zeros(shape, np.uint16)], layout, g)


@pytest.mark.parametrize(("dtype", "other"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_floats_of_another_kind_are_refused(dtype: str, other: str) -> None:
    """Read back by the same process they would seem right; another, which has the dtype that it says, reads noise."""
    torch = pytest.importorskip("torch")
    g = KVGeometry(layers=1, kv_heads=2, head_dim=8, dtype=dtype)
    for kind, fits in ((getattr(torch, other), False), (getattr(torch, dtype), True), (torch.int16, True)):
        entries = [torch.zeros(2, 4, 16, 2, 8, dtype=kind)]
        if fits:
            PagedKV.from_tensors(entries, "nhd", g)
            continue
        with pytest.raises(GeometryError, match=f"layer 0: {other} elements: {dtype} expected"):
            PagedKV.from_tensors(entries, "nhd", g)


def test_other_dtypes_layers_and_slots_are_refused() -> None:
    g = KVGeometry(layers=1, kv_heads=2, head_dim=8, block_tokens=4)
    good = np.zeros((2, 4, 4, 2, 8), np.uint16)
    with pytest.raises(GeometryError, match="4-byte elements"):
        PagedKV.from_tensors([good.astype(np.uint32)], "nhd", g)
    with pytest.raises(GeometryError, match="2 layers"):
        PagedKV.from_tensors([good, good], "nhd", g)
    kv = PagedKV.from_tensors([good], "nhd", g)
    memory, rows = np.zeros((1, g.block_bytes), np.uint8), np.zeros(1, np.int32)
    with pytest.raises(InputError, match=r"slot 16: the KV cache has slots 0\.\.15"):
        CpuCopier(g).scatter(kv, np.arange(13, 17), memory, rows)
    with pytest.raises(InputError, match="3 slots for 1 blocks"):
        CpuCopier(g).scatter(kv, np.arange(3), memory, rows)
