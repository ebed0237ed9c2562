"""Quantized rows: the CPU's kernels, the GPU's (in Triton's interpreter) and a plain oracle make the same bits."""

import dataclasses
import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.codec.floats import E4M3, to_e4m3
from cairn.codec.quantized import GROUP, Quantizer, quantizer_for
from cairn.copy import CpuCopier, DeviceRows, PagedKV
from cairn.copy.cpu_quantized import QuantizedCpuCopier
from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry, Layout
from tests.copy.fake_cuda import install

PAGES, PAGE_TOKENS, LAYERS = 4, 16, 2
CODECS = ("int4", "int8", "fp8")
LAYOUTS = ("nhd", "nhd_paged", "hnd", "halves", "cross_layer", "mla")


def to_float(elements: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def from_float(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """The bits of finite values, rounded to nearest even."""
    if dtype == "float16":
        return values.clip(-65504, 65504).astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return bits if dtype == "float32" else ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def oracle(block: npt.NDArray[Any], bits: int, dtype: str) -> tuple[bytes, npt.NDArray[Any], npt.NDArray[np.float32]]:
    """block: elements [layers, planes, tokens, channels]. The row, what comes back, and each element's scale (NaN where
    the group is)."""
    unit = {8: 8, 4: 1}[bits]
    row, back, scales = b"", np.empty_like(block), np.empty(block.shape, np.float32)
    fine = bits == 4 and block.shape[1] == 2
    for layer, plane in np.ndindex(block.shape[:2]):
        values = to_float(block[layer, plane], dtype)
        along_tokens = block.shape[1] == 2 and plane == 0
        groups = (values.T if along_tokens else values).reshape(-1, GROUP)
        with np.errstate(all="ignore"):
            low, high = groups.min(axis=1), groups.max(axis=1)
            largest = np.maximum(abs(low), abs(high))
            wanted = np.maximum((high - low) * np.float32(1 / (2**bits - unit)), largest * np.float32(1 / (127 * unit)))
            grid = np.array([(8 + m) * 2.0 ** (e - 19) for e in range(32) for m in range(8)], np.float32)
            code = np.searchsorted(grid[:255], wanted)
            bad = ~np.isfinite(wanted) | (code == 255)
            code = np.where(bad, 255, code)
            inverse = np.where(bad, 0, 1 / grid[code]).astype(np.float32)
            zero = np.rint((low * inverse - (unit - 1) / 2) / unit)
            zero = np.where(bad, 0, zero).astype(np.float32)
            codes = np.nan_to_num(np.rint(groups * inverse[:, None]) - unit * zero[:, None]).clip(0, 2**bits - 1)
            codes = np.where(bad[:, None], 0, codes).astype(np.uint8)
            exact = np.nan_to_num(np.rint((groups[:, 0] * inverse - unit * zero) * 16)).clip(-8, 247) + 8
            exact = np.where(bad, 8, exact).astype(np.uint8)
            part = np.zeros(codes.shape, np.float32)
            if fine and along_tokens:
                codes[:, 0], part[:, 0] = exact >> 4, ((exact & 15).astype(np.float32) - 8) / 16
        found = (codes + part + unit * zero[:, None]) * grid[code][:, None]
        nan = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}[dtype]
        elements = np.where(bad[:, None], nan, from_float(found.astype(np.float32), dtype)).astype(block.dtype)
        scale = np.broadcast_to(np.where(bad, np.nan, grid[code])[:, None], codes.shape)
        heads = (code | (zero.astype(np.int64) & 255) << 8).astype(np.uint16)
        shape = values.shape[::-1] if along_tokens else values.shape
        elements, scale, codes = (array.reshape(shape) for array in (elements, scale, codes))
        if along_tokens:
            elements, scale, codes = elements.T, scale.T, codes.T
            heads = heads.reshape(values.shape[1], -1).T
        back[layer, plane], scales[layer, plane] = elements, scale
        packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        row += heads.tobytes() + packed.tobytes()
        if fine and along_tokens:
            low_bits = (exact & 15).reshape(values.shape[1], -1).T
            more = low_bits[:, ::2] | low_bits[:, 1::2] << 4
        elif fine:
            row += more.tobytes()
    return row, back, scales


def float_oracle(block: npt.NDArray[Any], dtype: str) -> tuple[bytes, npt.NDArray[Any], npt.NDArray[np.float32]]:
    """As `oracle`, of fp8; the steps are those of each element's binade."""
    row, back, steps = b"", np.empty_like(block), np.empty(block.shape, np.float32)
    grid = np.array([(8 + m) * 2.0 ** (e - 19) for e in range(32) for m in range(8)], np.float32)
    for layer, plane in np.ndindex(block.shape[:2]):
        values = to_float(block[layer, plane], dtype)
        along_tokens = block.shape[1] == 2 and plane == 0
        tokens, channels = values.shape
        shape = (tokens // GROUP, GROUP, channels, 1) if along_tokens else (tokens, 1, channels // GROUP, GROUP)
        groups = values.reshape(shape)
        with np.errstate(all="ignore"):
            wanted = abs(groups).max(axis=(1, 3), keepdims=True) * np.float32(1 / 448)
            code = np.where(np.isfinite(wanted), np.searchsorted(grid[:255], wanted), 255)
            scale = np.where(code == 255, np.nan, grid[code]).astype(np.float32)
            codes = np.where(code == 255, 0, nearest_e4m3(groups * (1 / scale)))
        found = E4M3[codes] * scale
        nan = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}[dtype]
        elements = np.where(np.isnan(found), nan, from_float(found, dtype))
        back[layer, plane] = elements.reshape(values.shape)
        step = np.maximum(2.0 ** (np.frexp(E4M3[codes])[1] - 4), 2.0**-9) * scale
        steps[layer, plane] = step.reshape(values.shape)
        row += code.astype(np.uint8).tobytes() + codes.astype(np.uint8).tobytes()
    return row, back, steps


def nearest_e4m3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Codes, by looking for the nearest in a table; of two the even one."""
    sizes, table = abs(values).astype(np.float64), E4M3[:127].astype(np.float64)
    above = np.searchsorted(table, sizes).clip(1, 126)
    middle = (table[above - 1] + table[above]) / 2
    down = (sizes < middle) | ((sizes == middle) & (above % 2 == 1))
    return np.where(down, above - 1, above) | np.signbit(values) * 128


def test_e4m3_is_rounded_as_torch_rounds_it() -> None:
    """All bfloat16 of at most 448, all float16, and what lies in the middle of two codes or just beside it."""
    torch = pytest.importorskip("torch")
    every = np.arange(1 << 16, dtype=np.uint16)
    middles = ((E4M3[:126] + E4M3[1:127]) / 2).view(np.uint32)
    near = np.concatenate([middles - 1, middles, middles + 1]).view(np.float32)
    values = np.concatenate([to_float(every, "bfloat16"), to_float(every, "float16"), near, -near])
    values = values[abs(values) <= 448]
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn)
    codes = np.array([to_e4m3(value) for value in values], np.uint8)
    assert (codes == wanted.view(torch.uint8).numpy()).all()
    assert (codes == nearest_e4m3(values)).all()
    assert (E4M3[codes] == wanted.to(torch.float32).numpy()).all()


class Case:
    """A paged cache of some layout with values as caches have them, and rows beside it."""

    def __init__(self, layout: str, codec: str, dtype: str, blocks: int, block_tokens: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        planes: Any = 1 if layout == "mla" else 2
        heads, dim = (1, 48) if planes == 1 else (3, 16)
        g = KVGeometry(
            layers=LAYERS, kv_heads=heads, head_dim=dim, dtype=dtype, block_tokens=block_tokens, planes=planes
        )
        self.geometry, self.quantizer = g, Quantizer(g, codec)
        pages = PAGES * block_tokens // PAGE_TOKENS
        shape = {
            "nhd": (2, pages, PAGE_TOKENS, heads, dim),
            "nhd_paged": (pages, 2, PAGE_TOKENS, heads, dim),
            "hnd": (2, pages, heads, PAGE_TOKENS, dim),
            "halves": (pages, heads, PAGE_TOKENS, 2 * dim),  # vLLM's on CUDA
            "cross_layer": (pages, LAYERS, 2, PAGE_TOKENS, heads, dim),
            "mla": (pages, PAGE_TOKENS, dim),
        }[layout]
        self.tensors = [drawn(shape, dtype, rng) for _ in range(1 if layout == "cross_layer" else LAYERS)]
        entries: list[Any] = self.tensors
        if layout == "halves":
            entries = [tuple(np.split(tensor, 2, axis=-1)) for tensor in self.tensors]
        self.kv = PagedKV.from_tensors(entries, "hnd" if layout == "halves" else layout, g)
        slots = pages * PAGE_TOKENS
        self.slots = (rng.permutation(slots) if seed % 2 else np.arange(slots))[: blocks * block_tokens]
        self.rows = rng.permutation(blocks + 1)[:blocks].astype(np.int32)
        self.memory = rng.integers(0, 256, (blocks + 1, self.quantizer.stored.block_bytes + 64), dtype=np.uint8)

    def canonical(self) -> npt.NDArray[np.uint8]:
        """The blocks as plain rows."""
        plain = np.zeros((len(self.rows), self.geometry.block_bytes), np.uint8)
        CpuCopier(self.geometry).gather(self.kv, self.slots, plain, np.arange(len(plain), dtype=np.int32))
        return plain


def drawn(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Channels of different widths and centres; zeros, outliers, and now and then what is not finite."""
    values = rng.normal(0, 1, shape) * np.exp(rng.normal(0, 2, shape[-1])) + rng.normal(0, 3, shape[-1])
    values[rng.random(shape) < 0.01] *= 1000
    values[rng.random(shape) < 0.05] = 0
    values = values.astype(np.float32)
    for odd in (np.nan, np.inf, -np.inf, 1e30 if dtype != "float16" else 65504, 1e-7):
        values[tuple(rng.integers(0, size) for size in shape)] = odd
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return bits if dtype == "float32" else (bits >> 16).astype(np.uint16)


CASES = {
    "layout": st.sampled_from(LAYOUTS),
    "codec": st.sampled_from(CODECS),
    "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
    "block_tokens": st.sampled_from([16, 32]),
    "layers": st.sampled_from([range(LAYERS), range(1), range(1, 2)]),
    "seed": st.integers(0, 1 << 30),
}


@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_the_cpu_makes_of_blocks_what_the_oracle_does(
    layout: str, codec: str, dtype: str, block_tokens: int, layers: range, seed: int
) -> None:
    """And changes no byte beyond: not of other layers, not of other rows, not of tokens that are left out."""
    case = Case(layout, codec, dtype, 3, block_tokens, seed)
    g, size = case.geometry, case.quantizer.stored.layer_bytes
    word = np.uint32 if dtype == "float32" else np.uint16
    blocks = case.canonical().view(word).reshape(3, g.layers, g.planes, g.block_tokens, -1)
    bits = case.quantizer.bits
    found = [float_oracle(block, dtype) if codec == "fp8" else oracle(block, bits, dtype) for block in blocks]
    used = len(found[0][0]) // g.layers  # of a layer; what is left of it is nobody's
    assert bits_of_layer(case.quantizer) == 8 * used <= 8 * size
    copier = QuantizedCpuCopier(case.quantizer)
    expected = case.memory.copy()
    for row, (coded, _, _) in zip(case.rows, found, strict=True):
        for layer in layers:
            part = np.frombuffer(coded, np.uint8)[layer * used : (layer + 1) * used]
            expected[row, layer * size : layer * size + used] = part
    copier.gather(case.kv, case.slots, case.memory, case.rows, layers)
    assert (case.memory == expected).all()

    copier.gather(case.kv, case.slots, case.memory, case.rows)
    slots = np.where(np.random.default_rng(seed).random(len(case.slots)) < 0.3, -1, case.slots)
    plain = np.stack([back for _, back, _ in found]).reshape(3, -1).view(np.uint8)
    before = [tensor.copy() for tensor in case.tensors]
    CpuCopier(g).scatter(case.kv, slots, plain, np.arange(3, dtype=np.int32), layers)
    wanted = [tensor.copy() for tensor in case.tensors]
    for tensor, old in zip(case.tensors, before, strict=True):
        tensor[...] = old
    copier.scatter(case.kv, slots, case.memory, case.rows, layers)
    assert all((tensor == want).all() for tensor, want in zip(case.tensors, wanted, strict=True))

    scales = np.stack([scale for _, _, scale in found])
    with np.errstate(invalid="ignore"):
        error = abs(to_float(plain.view(word), dtype).reshape(blocks.shape) - to_float(blocks, dtype))
    # Of the product of a step and its number, and of the difference above; bf16 and fp16 round the result, too.
    rounding = abs(to_float(blocks, dtype)) * (2.0**-22 if dtype == "float32" else 2.0**-7)
    assert (np.isnan(scales) | (error <= scales / 2 * (1 + 1e-6) + rounding)).all()


def bits_of_layer(quantizer: Quantizer) -> int:
    """Without what rounding up a vector's bytes leaves over."""
    g = quantizer.geometry
    elements = g.planes * g.block_tokens * g.kv_heads * g.head_dim
    return elements * quantizer.bits + (8 * quantizer.head_bytes * elements + 2 * quantizer.fine * elements) // GROUP


@pytest.fixture
def kernel() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
        return importlib.import_module("cairn.copy.triton_quantized")


#: Every layout three times, every codec with every dtype twice.
COMBINATIONS = [
    (layout, CODECS[(i + i // 6) % 3], ("bfloat16", "float16", "float32")[i % 3])
    for i, layout in enumerate(3 * LAYOUTS)
]


@pytest.mark.parametrize(("seed", "layout", "codec", "dtype"), [(i, *one) for i, one in enumerate(COMBINATIONS)])
def test_the_gpu_makes_the_same_bits(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, layout: str, codec: str, dtype: str, seed: int
) -> None:
    import torch

    monkeypatch.setattr(kernel, "_TILE", kernel.tl.constexpr(16))  # of 24 pairs: one whole, and a part of one
    block_tokens, layers = [(16, range(LAYERS)), (32, range(1, 2))][seed // 2 % 2]
    case = Case(layout, codec, dtype, 2, block_tokens, seed)
    quantizer, rows = case.quantizer, np.arange(2, dtype=np.int32)
    size = quantizer.stored.layer_bytes
    width, used = len(layers) * size, bits_of_layer(quantizer) // 8
    staged = np.full((2, width), 0xA5, np.uint8)
    expected = case.memory.copy()
    QuantizedCpuCopier(quantizer).gather(case.kv, case.slots, expected, rows)
    bases = torch.from_numpy(case.kv.bases[layers.start : layers.stop].reshape(-1).copy())

    def move(slots: npt.NDArray[np.int64], into_rows: bool) -> None:
        kernel.move(
            bases,
            torch.from_numpy(slots.astype(np.int64)),
            staged.ctypes.data,
            quantizer,
            blocks=2,
            layers=len(layers),
            strides=(case.kv.page_stride, case.kv.token_stride, case.kv.head_stride),
            page_tokens=case.kv.page_tokens,
            aligned=False,
            programs=3,
            into_rows=into_rows,
        )

    move(case.slots, into_rows=True)
    at = layers.start * quantizer.stored.layer_bytes
    assert (staged == expected[:2, at : at + width])[:, np.arange(width) % size < used].all()
    slots = np.where(np.random.default_rng(seed).random(len(case.slots)) < 0.3, -1, case.slots)
    before = [tensor.copy() for tensor in case.tensors]
    QuantizedCpuCopier(quantizer).scatter(case.kv, slots, expected, rows, layers)
    wanted = [tensor.copy() for tensor in case.tensors]
    for tensor, old in zip(case.tensors, before, strict=True):
        tensor[...] = old
    move(slots, into_rows=False)
    assert all((tensor == want).all() for tensor, want in zip(case.tensors, wanted, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_cuda_copier_moves_quantized_rows(kernel: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Layer ranges, holes, several parts, in any order that the events allow."""
    cuda = importlib.import_module("cairn.copy.cuda")
    module = importlib.import_module("cairn.copy.cuda_quantized")
    case = Case(LAYOUTS[seed], CODECS[seed % 3], "bfloat16", 3, 16, seed)
    block = case.quantizer.stored.block_bytes
    monkeypatch.setattr(cuda, "_STAGING_BYTES", 2 * block)  # several parts: the ring goes round
    monkeypatch.setattr(cuda, "_FIRST_BYTES", block)
    monkeypatch.setattr(kernel, "_TILE", kernel.tl.constexpr(32))
    device = install(monkeypatch, seed)
    kv = dataclasses.replace(case.kv, device=0)
    copier = module.QuantizedCudaCopier(case.quantizer)
    copier.register(case.memory)
    copier.prepare(kv)
    on_cpu = QuantizedCpuCopier(case.quantizer)
    expected = case.memory.copy()
    on_cpu.gather(case.kv, case.slots, expected, case.rows)
    copier.gather_async(kv, case.slots, case.memory, case.rows).synchronize()
    size, used = case.quantizer.stored.layer_bytes, bits_of_layer(case.quantizer) // 8
    places = np.arange(case.memory.shape[1])
    kept = (places % size < used) | (places >= block)
    assert (case.memory == expected)[:, kept].all()

    slots = np.where(np.random.default_rng(seed).random(len(case.slots)) < 0.2, -1, case.slots)
    for tensor in case.tensors:
        tensor[...] = 0x1234
    on_cpu.scatter(case.kv, slots, case.memory, case.rows)
    wanted = [tensor.copy() for tensor in case.tensors]
    for tensor in case.tensors:
        tensor[...] = 0x1234
    loads = [copier.scatter_async(kv, slots, case.memory, case.rows, range(i, i + 1)) for i in range(LAYERS)]
    for load in loads:
        load.synchronize()
    assert all((tensor == want).all() for tensor, want in zip(case.tensors, wanted, strict=True))

    with pytest.raises(InputError, match="stored whole"):
        copier.gather(kv, slots, case.memory, case.rows)
    with pytest.raises(InputError, match="rows in VRAM"):
        copier.scatter(kv, slots, DeviceRows(0, 4, block, peer=False), case.rows)
    with pytest.raises(GeometryError, match=r"storage\.cpu\.codec"):
        copier.prepare(dataclasses.replace(kv, opaque=True))
    copier.close()
    assert not any(stream.queue for stream in device.streams)
    assert not device.pinned


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"head_dim": 20}, "head_dim=20"), ({"block_tokens": 8}, "block_tokens=8"), ({"dtype": "float8_e4m3"}, "dtype")],
)
def test_what_cannot_be_quantized_is_refused(changes: dict[str, Any], named: str) -> None:
    g = KVGeometry(**{"layers": 1, "kv_heads": 1, "head_dim": 32, **changes})
    with pytest.raises(GeometryError, match=f"{named}.*codec.* none"):
        quantizer_for(g, "int8")
    assert quantizer_for(g, "none") is None


def test_opaque_pages_are_quantized_where_their_order_is_known() -> None:
    """vLLM's on a CPU: equal rows, whatever the pages look like."""
    rng = np.random.default_rng(0)
    g = KVGeometry(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
    blocks = drawn((3, *g.block_shape), "float32", rng).reshape(3, -1).view(np.uint8)
    page, rows = Layout("vllm_cpu"), np.arange(3, dtype=np.int32)
    pages = [np.zeros((3, 2, 16, 32), np.uint32) for _ in range(2)]
    own = np.empty_like(blocks)
    for block, row in zip(blocks, own, strict=True):
        page.from_canonical(block, row, g)
    kv, slots = PagedKV.from_tensors(pages, "vllm", g), np.arange(48)
    CpuCopier(g).scatter(kv, slots, own, rows)
    quantizer = Quantizer(g, "int4")
    copier = QuantizedCpuCopier(quantizer, page=page)
    memory = np.zeros((3, quantizer.stored.block_bytes), np.uint8)
    copier.gather(kv, slots, memory, rows)
    for block, row in zip(blocks, memory, strict=True):
        expected = np.zeros_like(row)
        quantizer.encode(block, expected, range(2))
        assert (row == expected).all()
    copier.scatter(kv, slots, memory, rows, range(1, 2))
    for i in range(3):
        back, found = np.zeros_like(blocks[i]), np.zeros_like(blocks[i])
        quantizer.decode(memory[i], back, range(2))
        page.to_canonical(np.concatenate([p[i].reshape(-1) for p in pages]).view(np.uint8), found, g)
        half = g.layer_bytes
        assert (found[half:] == back[half:]).all()
        assert (found[:half] == blocks[i, :half]).all()
    with pytest.raises(GeometryError, match="opaque"):
        QuantizedCpuCopier(quantizer).gather(kv, slots, memory, rows)
