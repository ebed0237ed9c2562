"""VRAM of a CUDA device with a driver that only keeps books."""

import ctypes
import importlib
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.copy import DeviceRows, driver
from cairn.errors import ConfigError, StorageError
from cairn.tier.vram import open_device

pytest.importorskip("torch")
pytest.importorskip("triton")


class Driver:
    """Allocations, exports and mappings by address. failing: calls that fail."""

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        self.mapped: list[int] = []
        self.failing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 1 if name in self.failing else getattr(self, f"_{name}")(*arguments)

        return call

    def _cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0

    _cuCtxSetCurrent = _cuCtxGetCurrent  # noqa: N815

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        address._obj.value = 4096 * (len(self.taken) + 1)
        self.taken[address._obj.value] = size.value
        return 0

    def _cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.taken[address.value]
        return 0

    def _cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:  # noqa: N802
        ctypes.memmove(handle, address.value.to_bytes(64, "little"), 64)
        return 0

    def _cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:  # noqa: N802
        address._obj.value = (1 << 40) + int.from_bytes(bytes(handle), "little")
        self.mapped.append(address._obj.value)
        return 0 if flags.value == 1 else 1

    def _cuIpcCloseMemHandle(self, address: Any) -> int:  # noqa: N802
        self.mapped.remove(address.value)
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 1,
        device=lambda _: nullcontext(),
        synchronize=lambda *_: None,
    )
    monkeypatch.setattr(importlib.import_module("cairn.tier.vram.cuda"), "torch", SimpleNamespace(cuda=cuda))
    found = Driver()
    monkeypatch.setattr(driver, "_library", lambda: found)
    return found


def test_segments_are_taken_mapped_and_given_back(library: Driver) -> None:
    device = open_device("cuda")
    assert device.index == 1
    own = device.take(3, 8192)
    assert own.memory == DeviceRows(4096, 3, 8192, False)
    assert library.taken == {4096: 2 << 20}, "whole pages"
    assert len(own.handle) == 64
    peer = open_device("cuda:0").map(own.handle, 3, 8192)
    assert peer.memory == DeviceRows((1 << 40) + 4096, 3, 8192, True)
    for segment in (peer, own, peer, own):
        segment.close()
    assert not library.taken
    assert not library.mapped


def test_what_the_driver_refuses(library: Driver) -> None:
    device = open_device("cuda:0")
    library.failing = {"cuIpcGetMemHandle"}
    with pytest.raises(StorageError, match="exporting"):
        device.take(1, 4096)
    assert not library.taken
    library.failing = {"cuMemAlloc_v2", "cuIpcOpenMemHandle_v2"}
    with pytest.raises(StorageError, match="taking 4096 bytes of VRAM"):
        device.take(1, 4096)
    with pytest.raises(StorageError, match="mapping"):
        device.map(bytes(64), 1, 4096)
    with pytest.raises(StorageError, match="handle of 3 bytes"):
        device.map(b"abc", 1, 4096)
    library.failing = set()
    segment = device.take(1, 4096)
    library.failing = {"cuMemFree_v2"}
    segment.close()  # logged, not raised
    with pytest.raises(ConfigError, match="finds 2 device"):
        open_device("cuda:2")


def test_without_torch_or_a_gpu(library: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cairn.tier.vram.cuda")
    module.torch.cuda.is_available = lambda: False
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        open_device("cuda")
    monkeypatch.setitem(sys.modules, "cairn.tier.vram.cuda", None)
    with pytest.raises(ConfigError, match="needs torch and triton"):
        open_device("cuda")
