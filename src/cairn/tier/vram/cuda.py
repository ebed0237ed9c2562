"""VRAM of a CUDA device, shared by CUDA IPC. Imports torch: import it only where a CUDA device is used."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from cairn.copy import Copier, DeviceRows, driver
from cairn.copy.cuda import CudaCopier
from cairn.errors import ConfigError, StorageError
from cairn.kv import KVGeometry
from cairn.observe.log import log_once
from cairn.tier.vram.base import Device, Segment

log = logging.getLogger(__name__)


class _CudaSegment(Segment):
    def __init__(
        self, device: "Cuda", rows: DeviceRows, handle: bytes, give_back: Callable[[int], None], what: str
    ) -> None:
        super().__init__(rows.rows, rows.stride)
        self.memory = self._rows = rows
        self.handle = handle
        self._device = device
        self._give_back: Callable[[int], None] | None = give_back
        self._what = what

    @property
    def address(self) -> int:
        return self._rows.address

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            self._device.call(give_back, self.address)
        except StorageError as error:
            log_once(log, self._what, f"a segment of VRAM: {error}")


class Cuda(Device):
    """One GPU of this process. index: torch's number of it, its current one unless given."""

    def __init__(self, index: int | None = None) -> None:
        """Raises ConfigError where there is no such GPU."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "storage.vram.device: torch finds no CUDA device; name stand-in, or set storage.vram.size=0"
            )
        found = torch.cuda.device_count()
        self.index = int(torch.cuda.current_device() if index is None else index)
        if self.index >= found:
            raise ConfigError(f"storage.vram.device=cuda:{self.index}: torch finds {found} device(s), cuda:0 the first")
        with torch.cuda.device(self.index):
            torch.cuda.synchronize()  # has the context made
            self._context = driver.current_context()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the driver in this device's context, which is the thread's afterwards as before."""
        with torch.cuda.device(self.index):
            driver.use(self._context)
            return function(*arguments)

    def take(self, slots: int, stride: int) -> Segment:
        address = self.call(driver.allocate, slots * stride)
        try:
            handle = self.call(driver.export, address)
        except StorageError:
            self.call(driver.free, address)
            raise
        return _CudaSegment(self, DeviceRows(address, slots, stride, False), handle, driver.free, "free")

    def map(self, handle: bytes, slots: int, stride: int) -> Segment:
        if len(handle) != driver.HANDLE_BYTES:
            raise StorageError(f"a handle of {len(handle)} bytes: CUDA's have {driver.HANDLE_BYTES}")
        address = self.call(driver.map_handle, handle)
        return _CudaSegment(self, DeviceRows(address, slots, stride, True), handle, driver.unmap, "unmap")

    def copier(self, geometry: KVGeometry, threads: int) -> Copier:
        return CudaCopier(geometry, self.index)
