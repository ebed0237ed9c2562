"""The CUDA copier's bookkeeping without a GPU: streams that run in any order, the kernel in Triton's interpreter."""

import dataclasses
import importlib
import threading
import zlib
from typing import Any

import numpy as np
import pytest

from cairn.copy import CpuCopier, DeviceRows, PagedKV
from cairn.errors import InputError, StorageError
from cairn.kv import KVGeometry
from tests.copy.fake_cuda import FakeCuda, install

pytest.importorskip("torch")
pytest.importorskip("triton")
cuda = importlib.import_module("cairn.copy.cuda")

G = KVGeometry(layers=3, kv_heads=2, head_dim=8, block_tokens=4)
PAGES, BLOCKS = 12, 9


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    """Each case of a test runs its streams in an order of its own."""
    monkeypatch.setattr(cuda, "_STAGING_BYTES", 2 * G.block_bytes)  # several parts: the ring goes round
    monkeypatch.setattr(cuda, "_FIRST_BYTES", G.block_bytes)
    return install(monkeypatch, getattr(request, "param", zlib.crc32(request.node.name.encode())))


def case(seed: int) -> tuple[list[Any], Any, Any, Any]:
    """(tensors, slots, memory, rows), all random."""
    rng = np.random.default_rng(seed)
    tensors = [rng.integers(0, 1 << 16, (2, PAGES, 4, 2, 8), dtype=np.uint16) for _ in range(3)]
    memory = rng.integers(0, 256, (BLOCKS + 1, G.block_bytes + 64), dtype=np.uint8)
    rows = rng.permutation(BLOCKS + 1)[:BLOCKS].astype(np.int32)
    return tensors, rng.permutation(PAGES * 4)[: BLOCKS * 4], memory, rows


def on_device(tensors: list[Any]) -> PagedKV:
    return dataclasses.replace(PagedKV.from_tensors(tensors, "nhd", G), device=0)


@pytest.mark.parametrize("path", cuda.PATHS)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("layers", [None, range(1, 2)])
@pytest.mark.parametrize("into_rows", [True, False])
def test_every_path_copies_what_the_cpu_copier_copies(
    device: FakeCuda, path: str, holes: bool, pinned: bool, layers: range | None, into_rows: bool
) -> None:
    tensors, slots, memory, rows = case(1)
    before = [array.copy() for array in [*tensors, memory]]
    if holes:
        slots[[0, 7]] = -1
    name = "gather" if into_rows else "scatter"
    getattr(CpuCopier(G), name)(PagedKV.from_tensors(tensors, "nhd", G), slots, memory, rows, layers)
    expected = [array.copy() for array in [*tensors, memory]]
    for array, old in zip([*tensors, memory], before, strict=True):
        array[...] = old
    copier = cuda.CudaCopier(G, path=path)
    copier.prepare(on_device(tensors))
    if pinned:
        copier.register(memory)
    getattr(copier, name)(on_device(tensors), slots, memory, rows, layers)
    assert all((a == b).all() for a, b in zip([*tensors, memory], expected, strict=True))
    assert bool(device.batches) == pinned
    copier.close()
    assert not device.pinned


@pytest.mark.parametrize("path", cuda.PATHS)
@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("layers", [None, range(1, 3)])
@pytest.mark.parametrize("into_rows", [True, False])
def test_rows_in_vram(
    device: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    peer: bool,
    holes: bool,
    layers: range | None,
    into_rows: bool,
) -> None:
    monkeypatch.setattr(cuda, "_PEER_STAGING_BYTES", 3 * G.block_bytes)
    monkeypatch.setattr(cuda, "_PEER_FIRST_BYTES", G.block_bytes)
    tensors, slots, memory, rows = case(4)
    before = [array.copy() for array in [*tensors, memory]]
    if holes:
        slots[[0, 7]] = -1
    name = "gather" if into_rows else "scatter"
    getattr(CpuCopier(G), name)(PagedKV.from_tensors(tensors, "nhd", G), slots, memory, rows, layers)
    expected = [array.copy() for array in [*tensors, memory]]
    for array, old in zip([*tensors, memory], before, strict=True):
        array[...] = old
    copier = cuda.CudaCopier(G, path=path)
    copier.prepare(on_device(tensors), direct=True)
    in_vram = DeviceRows(memory.ctypes.data, len(memory), memory.strides[0], peer)
    getattr(copier, name)(on_device(tensors), slots, in_vram, rows, layers)
    assert all((a == b).all() for a, b in zip([*tensors, memory], expected, strict=True))
    copier.close()


@pytest.mark.parametrize("device", [1, 2], indirect=True)
@pytest.mark.parametrize("peer", [None, True, False])
@pytest.mark.parametrize("slot", [0, 1, -1, PAGES * 4])
@pytest.mark.parametrize("into_rows", [True, False])
def test_long_blocks_come_in_one_copy_each(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch, peer: bool | None, slot: int, into_rows: bool
) -> None:
    """Pages that are one run, from host memory (None), a peer's or the own VRAM; one block of them may be no page."""
    monkeypatch.setattr(cuda, "BREAK_EVEN", G.block_bytes)
    monkeypatch.setattr(cuda, "_PEER_FIRST_BYTES", 2 * G.block_bytes)
    rng = np.random.default_rng(7)
    tensor = rng.integers(0, 1 << 16, (PAGES, 3, 2, 4, 2, 8), dtype=np.uint16)
    _, _, memory, rows = case(7)
    slots = (rng.permutation(PAGES - 1)[:BLOCKS, None] * 4 + 4 + np.arange(4)).reshape(-1)
    slots[-4] = slot or slots[-4]
    kv = PagedKV.from_tensors([tensor], "cross_layer", G)
    copier = cuda.CudaCopier(G)
    copier.prepare(dataclasses.replace(kv, device=0), direct=True)
    copier.register(memory)
    there = memory if peer is None else DeviceRows(memory.ctypes.data, len(memory), memory.strides[0], peer)
    name = "gather" if into_rows else "scatter"
    before = tensor.copy(), memory.copy()
    if slot >= PAGES * 4:
        with pytest.raises(InputError, match="slot 48"):
            getattr(copier, name)(dataclasses.replace(kv, device=0), slots, there, rows)
        assert (tensor == before[0]).all()
        assert (memory == before[1]).all()
        return
    getattr(CpuCopier(G), name)(kv, slots, memory, rows)
    expected = tensor.copy(), memory.copy()
    tensor[...], memory[...] = before
    getattr(copier, name)(dataclasses.replace(kv, device=0), slots, there, rows)
    assert (tensor == expected[0]).all()
    assert (memory == expected[1]).all()
    if slot == 0:
        assert device.batches == {None: [2, 4, 2], True: [2, 4, 3], False: []}[peer]
    copier.close()


def test_memory_that_is_released_is_not_pinned_any_more(device: FakeCuda) -> None:
    copier = cuda.CudaCopier(G)
    first, second = (np.zeros((4, 64), np.uint8) for _ in range(2))
    for memory in (first, second, first):
        copier.register(memory)
    copier.release(first)
    copier.release(first)
    assert device.pinned == {second.ctypes.data}
    copier.close()
    assert not device.pinned


@pytest.mark.parametrize("device", range(6), indirect=True)
@pytest.mark.parametrize("path", ["pieces", "staged"])
def test_copies_wait_for_the_model(device: FakeCuda, path: str) -> None:
    """Both directions at once, several calls: each sees what the model had done when it was given to do."""
    tensors, slots, memory, rows = case(2)
    spare = memory.copy()
    kv = on_device(tensors)
    copier = cuda.CudaCopier(G, path=path)
    copier.register(memory)
    copier.register(spare)
    new = [np.full_like(tensor, 7) for tensor in tensors]

    def model_writes() -> None:
        for tensor, value in zip(tensors, new, strict=True):
            tensor[...] = value

    device.enqueue(model_writes)
    after = device.default.record_event()
    stores = [copier.gather_async(kv, slots, memory, rows, None, after) for _ in range(2)]
    stores[-1].synchronize()
    assert (memory[rows, : G.block_bytes].view(np.uint16) == 7).all()
    device.enqueue(model_writes)
    after = device.default.record_event()
    loads = [copier.scatter_async(kv, slots, spare, rows, range(i, i + 1), after) for i in range(3)]
    for layer, load in enumerate(loads):
        load.synchronize()
        expected = [np.full_like(tensor, 7) for tensor in tensors]
        CpuCopier(G).scatter(PagedKV.from_tensors(expected, "nhd", G), slots, spare, rows, range(layer + 1))
        assert all((tensors[i] == expected[i]).all() for i in range(layer + 1))


@pytest.mark.parametrize("device", range(8), indirect=True)
def test_calls_under_way_keep_their_tables(device: FakeCuda) -> None:
    """Five calls of different lengths, none waited for: each kernel reads its own call's slots."""
    tensors, slots, memory, _ = case(4)
    expected = memory.copy()
    copier = cuda.CudaCopier(G, path="staged")
    kv = on_device(tensors)
    copier.prepare(kv)
    copier.register(memory)
    enqueued, first = [], 0
    for blocks in (1, 3, 1, 2, 2):
        stop = first + blocks
        rows, part = np.arange(first, stop, dtype=np.int32), slots[first * 4 : stop * 4]
        enqueued.append(copier.gather_async(kv, part, memory, rows))
        CpuCopier(G).gather(PagedKV.from_tensors(tensors, "nhd", G), part, expected, rows)
        first = stop
    for copy in reversed(enqueued):
        copy.synchronize()
    assert (memory == expected).all()
    copier.close()


def test_a_cache_may_be_registered_while_others_are_copied(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of both are sent through the same memory."""
    tensors, slots, memory, rows = case(4)
    expected = memory.copy()
    CpuCopier(G).gather(PagedKV.from_tensors(tensors, "nhd", G), slots, expected, rows)
    copier = cuda.CudaCopier(G, path="staged")
    kv = on_device(tensors)
    copier.prepare(kv)
    copier.register(memory)
    triton_kernel = importlib.import_module("cairn.copy.triton_kernel")
    fetch, preparing = triton_kernel.fetch, threading.Thread(target=copier.prepare, args=(on_device(case(5)[0]),))

    def prepared(*arguments: Any) -> None:
        if preparing.ident is None:
            preparing.start()
            preparing.join(0.5)
        fetch(*arguments)

    monkeypatch.setattr(triton_kernel, "fetch", prepared)
    copier.gather_async(kv, slots, memory, rows).synchronize()
    preparing.join(30)
    assert not preparing.is_alive()
    assert (memory == expected).all()
    copier.close()


def test_a_store_waits_for_no_copy_to_the_device(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go one after the other, whatever their streams: its kernels would wait for every load before it."""
    tensors, slots, memory, rows = case(4)
    copier = cuda.CudaCopier(G, path="staged")
    kv = on_device(tensors)
    copier.prepare(kv)
    copier.register(memory)
    streams, copy = [], FakeCuda._copy

    def noted(fake: FakeCuda, stream: Any, pieces: Any) -> None:
        streams.append(stream.value)
        copy(fake, stream, pieces)

    monkeypatch.setattr(FakeCuda, "_copy", noted)
    copier.gather_async(kv, slots, memory, rows).synchronize()
    assert set(streams) == {copier._store.copies.cuda_stream}
    copier.close()


@pytest.mark.parametrize("path", ["pieces", "staged"])
@pytest.mark.parametrize("name", ["gather_async", "scatter_async"])
def test_a_call_that_fails_half_way_leaves_nothing_under_way(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    tensors, slots, memory, rows = case(3)
    copier = cuda.CudaCopier(G, path=path)
    copier.register(memory)
    real, calls = FakeCuda.cuMemcpyBatchAsync_v2, []

    def third_fails(fake: FakeCuda, *arguments: Any) -> int:
        calls.append(arguments)
        return 1 if len(calls) == 3 else real(fake, *arguments)

    monkeypatch.setattr(FakeCuda, "cuMemcpyBatchAsync_v2", third_fails)
    with pytest.raises(StorageError, match="CUDA error 1"):
        getattr(copier, name)(on_device(tensors), slots, memory, rows)
    assert not any(stream.queue for stream in device.streams)


def test_parts_grow_and_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_FIRST_BYTES", 4 << 20)
    parts = list(cuda._parts(100, 1 << 20, 16 << 20))
    assert [stop - first for first, stop in parts] == [4, 8, 16, 16, 16, 16, 16, 8]
    assert [first for first, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
    assert list(cuda._parts(2, 1 << 30, 1 << 20)) == [(0, 1), (1, 2)]
    assert list(cuda._parts(0, 1)) == []


def test_what_does_not_fit_is_refused(device: FakeCuda) -> None:
    tensors, *_ = case(0)
    kv = PagedKV.from_tensors(tensors, "nhd", G)
    memory, rows = np.zeros((1, G.block_bytes), np.uint8), np.zeros(1, np.int32)
    with pytest.raises(InputError, match="path='sideways'"):
        cuda.CudaCopier(G, path="sideways")
    with pytest.raises(InputError, match=r"storage\.vram\.device"):
        CpuCopier(G).gather(dataclasses.replace(kv, device=0), np.arange(4), memory, rows)
    with pytest.raises(InputError, match="device -1"):
        cuda.CudaCopier(G).gather(kv, np.arange(4), memory, rows)
    with pytest.raises(InputError, match="3 slots"):
        cuda.CudaCopier(G).gather(dataclasses.replace(kv, device=0), np.arange(3), memory, rows)
