"""A worker's copies on a GPU, in order with the model's work, whatever order the streams run in."""

import dataclasses
import importlib
import itertools
import threading
from typing import Any

import numpy as np
import pytest

from cairn.copy import CpuCopier, DeviceRows, PagedKV
from cairn.errors import StorageError
from cairn.kv import KVGeometry
from tests.copy.fake_cuda import FakeCuda, install

pytest.importorskip("torch")
pytest.importorskip("triton")

G = KVGeometry(layers=8, kv_heads=2, head_dim=8, block_tokens=4)
PAGES, BLOCKS = 8, 6
SEEDS = range(5)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    monkeypatch.setattr("cairn.copy.cuda._STAGING_BYTES", 2 * G.block_bytes)
    monkeypatch.setattr("cairn.copy.cuda._FIRST_BYTES", G.block_bytes)
    monkeypatch.setattr("cairn.connect.vllm.cuda_mover._PIECE_BYTES", G.layer_bytes)
    return install(monkeypatch, request.param)


class Rig:
    """A mover, its paged cache and its rows, all random."""

    def __init__(self, overlapping: bool = False) -> None:
        rng = np.random.default_rng(4)
        self.tensors = [rng.integers(0, 1 << 16, (2, PAGES, 4, 2, 8), dtype=np.uint16) for _ in range(G.layers)]
        self.memory = rng.integers(0, 256, (BLOCKS, G.block_bytes), dtype=np.uint8)
        self.slots = (rng.permutation(PAGES)[:BLOCKS, None] * 4 + np.arange(4)).reshape(-1)
        self.rows = rng.permutation(BLOCKS).astype(np.int32)
        self.kv = PagedKV.from_tensors(self.tensors, "nhd", G)
        module = importlib.import_module("cairn.connect.vllm.cuda_mover")
        kv = dataclasses.replace(self.kv, device=0)
        self.mover = module.CudaMover(G, kv, self.memory, self.memory, overlapping=overlapping)

    def poison(self) -> None:
        """What held the pages before writes them once more."""
        for tensor in self.tensors:
            tensor[:, self.slots[::4] // 4] = 7

    def loaded(self, layers: range | None = None) -> list[Any]:
        """The tensors as they are to be after a load."""
        expected = [tensor.copy() for tensor in self.tensors]
        CpuCopier(G).scatter(PagedKV.from_tensors(expected, "nhd", G), self.slots, self.memory, self.rows, layers)
        return expected


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_the_model_reads_each_layer_behind_its_load(device: FakeCuda) -> None:
    rig = Rig()
    expected = rig.loaded()
    seen: list[bool] = []
    device.enqueue(rig.poison)
    load = rig.mover.load_layers(rig.slots, rig.rows)
    for layer in range(G.layers):
        load.wait(layer, 60)
        device.enqueue(lambda i=layer: seen.append(bool((rig.tensors[i] == expected[i]).all())))
    assert load.end().result() >= 0
    device.default.synchronize()
    assert seen == [True] * G.layers
    rig.mover.close()


def fail(rig: Rig, monkeypatch: pytest.MonkeyPatch, from_call: int, to_call: float = float("inf")) -> None:
    """Calls from_call..to_call (counted from 1) of the copier's scatter fail."""
    real, calls = rig.mover.copier.scatter_async, itertools.count(1)

    def failing(*arguments: Any) -> Any:
        if from_call <= next(calls) <= to_call:
            raise StorageError("injected")
        return real(*arguments)

    monkeypatch.setattr(rig.mover.copier, "scatter_async", failing)


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_a_piece_that_fails_ahead_of_time_is_tried_again(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(overlapping=True)
    expected = rig.loaded()
    fail(rig, monkeypatch, 2, 2)
    load = rig.mover.load_layers(rig.slots, rig.rows)
    for layer in range(G.layers):
        load.wait(layer, 60)
    assert load.end().result() >= 0
    device.default.synchronize()
    assert all((tensor == right).all() for tensor, right in zip(rig.tensors, expected, strict=True))
    rig.mover.close()


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_what_is_computed_instead_of_a_failed_load_stays(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    fail(rig, monkeypatch, 2)
    load = rig.mover.load_layers(rig.slots, rig.rows)
    for layer in range(G.layers):
        load.wait(layer, 60)
    assert isinstance(load.end().exception(), StorageError)
    for tensor in rig.tensors:
        device.enqueue(lambda tensor=tensor: tensor.fill(7))
    device.default.synchronize()
    for stream in device.streams:
        stream.synchronize()
    assert all((tensor == 7).all() for tensor in rig.tensors)
    rig.mover.close()


@pytest.mark.parametrize("device", [0], indirect=True)
def test_where_steps_overlap_a_failed_load_ends_the_engine(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(overlapping=True)
    fail(rig, monkeypatch, 2)
    load = rig.mover.load_layers(rig.slots, rig.rows)
    load.wait(0, 60)
    with pytest.raises(StorageError, match="injected"):
        load.wait(G.layers - 1, 60)
    rig.mover.close()


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_pages_are_overwritten_after_their_store(device: FakeCuda) -> None:
    rig = Rig()
    expected = rig.memory.copy()
    CpuCopier(G).gather(rig.kv, rig.slots, expected, rig.rows)
    stores = [rig.mover.store(rig.slots, rig.rows) for _ in range(2)]
    rig.mover.settle_stores()
    for tensor in rig.tensors:
        device.enqueue(lambda tensor=tensor: tensor.fill(7))
    device.default.synchronize()
    assert [store.result() >= 0 for store in stores] == [True, True]
    assert (rig.memory == expected).all()
    rig.mover.close()


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_pages_are_overwritten_after_stores_to_vram_and_dram(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go by streams of their own, so that the end of the latest says nothing of the other."""
    monkeypatch.setattr("cairn.copy.cuda.BREAK_EVEN", 0)  # DRAM is written by the copy engines
    rig = Rig()
    expected = rig.memory.copy()
    CpuCopier(G).gather(rig.kv, rig.slots, expected, rig.rows)
    segment = rig.memory.copy()
    vram = DeviceRows(segment.ctypes.data, BLOCKS, segment.strides[0], False)
    stores = [rig.mover.store(rig.slots, rig.rows), rig.mover.store(rig.slots, rig.rows, vram)]
    rig.mover.settle_stores()
    for tensor in rig.tensors:
        device.enqueue(lambda tensor=tensor: tensor.fill(7))
    device.default.synchronize()
    assert [store.result() >= 0 for store in stores] == [True, True]
    assert (rig.memory == expected).all()
    assert (segment == expected).all()
    # And from there: a peer's rows.
    load = rig.mover.load(rig.slots, rig.rows, vram._replace(peer=True))
    assert load.result() >= 0
    again = np.zeros_like(segment)
    CpuCopier(G).gather(rig.kv, rig.slots, again, rig.rows)
    assert (again == expected).all()
    rig.mover.close()


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_loads_and_stores_come_behind_the_model(device: FakeCuda) -> None:
    rig = Rig()
    device.enqueue(lambda: rig.memory.fill(9))
    rig.mover.load(rig.slots, rig.rows).result()
    whole = [tensor[:, rig.slots[::4] // 4] for tensor in rig.tensors]
    assert all((part.view(np.uint8) == 9).all() for part in whole)
    rig.mover.close()


@pytest.mark.parametrize("device", SEEDS, indirect=True)
def test_a_copy_is_over_when_its_bytes_are_there(device: FakeCuda) -> None:
    rig = Rig()
    copying, told = rig.mover.load(rig.slots, rig.rows), threading.Event()
    assert not copying.done()
    copying.add_done_callback(lambda _: told.set())
    assert told.wait(60)
    assert copying.done()
    expected = rig.loaded()
    assert all((tensor == right).all() for tensor, right in zip(rig.tensors, expected, strict=True))
    rig.mover.close()


@pytest.mark.parametrize("device", [0], indirect=True)
def test_a_copy_that_cannot_be_made_has_failed(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    fail(rig, monkeypatch, 1)
    load = rig.mover.load(rig.slots, rig.rows)
    assert load.done()
    assert isinstance(load.exception(), StorageError)
    rig.mover.close()


@pytest.mark.parametrize("device", [0], indirect=True)
def test_a_timer_tells_when_the_model_is_done(device: FakeCuda) -> None:
    rig = Rig()
    timer = rig.mover.timer()
    device.enqueue(lambda: None)
    timer.stop()
    assert timer.seconds() is None
    device.default.synchronize()
    assert timer.seconds() is not None
    rig.mover.close()
