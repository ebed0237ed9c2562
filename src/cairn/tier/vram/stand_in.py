"""What stands in for a GPU where there is none: memory without a name (memfd), which goes with the last process that
maps it, as VRAM goes with its owner.
"""

import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cairn.copy import Copier, CpuCopier
from cairn.errors import StorageError
from cairn.kv import KVGeometry
from cairn.tier.vram.base import Device, Segment

_PREFIX = "cairn-vram-"


class _MemorySegment(Segment):
    memory: npt.NDArray[np.uint8]

    def __init__(self, descriptor: int, handle: bytes, slots: int, stride: int) -> None:
        super().__init__(slots, stride)
        self.handle = handle
        self._descriptor = descriptor
        self.memory = np.frombuffer(mmap.mmap(descriptor, slots * stride), np.uint8).reshape(slots, stride)
        self._address = int(self.memory.ctypes.data)

    @property
    def address(self) -> int:
        return self._address

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.memory = self.memory[:0].copy()  # the mapping goes with the last view of it


class StandIn(Device):
    """Host memory in the place of VRAM. A handle is "pid descriptor name", by which /proc gives the memory away to
    processes of the same user as long as its owner lives.
    """

    index = -1

    def take(self, slots: int, stride: int) -> Segment:
        # Asked before: taking it page by page would end in the kernel's killing somebody.
        there = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if slots * stride > there:
            raise StorageError(f"storage.vram.size: {slots * stride} bytes of {there} that are free; lower it")
        name = _PREFIX + secrets.token_hex(8)
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, slots * stride)
            return _MemorySegment(descriptor, f"{os.getpid()} {descriptor} {name}".encode(), slots, stride)
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"storage.vram.size: the system has no {slots * stride} bytes ({error.strerror}); lower it"
            ) from None

    def map(self, handle: bytes, slots: int, stride: int) -> Segment:
        pid, number, name = _parts(handle)
        descriptor = -1
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            found = Path(f"/proc/self/fd/{descriptor}").readlink()
            if name not in str(found) or os.fstat(descriptor).st_size != slots * stride:
                raise StorageError(f"a segment of process {pid}: is another by now")
            return _MemorySegment(descriptor, handle, slots, stride)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"a segment of process {pid}: cannot be mapped ({error.strerror})") from None

    def copier(self, geometry: KVGeometry, threads: int) -> Copier:
        return CpuCopier(geometry, threads)


def _parts(handle: bytes) -> tuple[int, int, str]:
    try:
        pid, number, name = handle.decode("ascii").split()
        return int(pid), int(number), name
    except ValueError:
        raise StorageError("a segment's handle: is none of a stand-in's") from None
