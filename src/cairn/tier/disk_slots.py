"""The data file of a cache directory: fixed slots of one header page and one block, read and written in one call each.

The slot is moved by a single preadv or pwritev over [the worker's header page, the row of the caller's memory], so that
the payload is never copied by the CPU; O_DIRECT keeps it out of the page cache as well. The checksum is made and
checked in the same worker: xxhash frees the GIL and sums at several times the speed of an NVMe device.
"""

import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.codec import FrameHeader
from cairn.codec.base import Octets
from cairn.codec.frame import Framer, checksum_of
from cairn.observe.reasons import Reason
from cairn.tier.disk_directory import PAGE

log = logging.getLogger(__name__)

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason_of(error: OSError) -> Reason:
    """How an error of the system counts."""
    return Reason.NO_SPACE if error.errno in _FULL else Reason.IO_ERROR


class SlotFile:
    """The slots of a data file. Thread-safe; owns its file descriptor `fd` until `close`, and nothing else.

    direct: whether O_DIRECT is in use; a file system that refuses it is served through the page cache.
    """

    def __init__(self, path: Path, framer: Framer, *, writable: bool = True) -> None:
        self._framer = framer
        self.block_bytes = framer.codec.geometry.block_bytes
        self._row_bytes = -(-self.block_bytes // PAGE) * PAGE
        self.slot_bytes = PAGE + self._row_bytes
        self._local = threading.local()
        self.fd, self.direct = _open_direct(path, os.O_RDWR if writable else os.O_RDONLY, self._page())

    def read(self, slot: int, key: bytes, row: Octets) -> Reason | None:
        """Fills row [>= block bytes rounded up to pages] with the block `key`, and proves that it is that block.

        Anything else is the reason returned; the row then holds anything.
        """
        page, body = self._page(), row[: self._row_bytes]
        try:
            got = os.preadv(self.fd, [page, body.data], slot * self.slot_bytes)
        except OSError as error:
            return reason_of(error)
        if got != self.slot_bytes:
            return Reason.CORRUPT
        header = self._framer.expect(page, key)
        if not isinstance(header, FrameHeader):
            return header
        block = row[: self.block_bytes]
        sound = header.verifies(block) and self._framer.codec.decode(block, block)
        return None if sound else Reason.CORRUPT

    def sum(self, row: Octets) -> bytes:
        """The checksum of the block in `row`, for `write`."""
        return checksum_of(row[: self.block_bytes])

    def write(self, slot: int, key: bytes, namespace: bytes, row: Octets, checksum: bytes) -> Reason | None:
        """Puts the block in `row` and its frame into a slot; when None, the system has it all."""
        page, body = self._page(), row[: self._row_bytes]
        page[:] = self._framer.pack(key, namespace, row[: self.block_bytes], size=PAGE, checksum=checksum)
        try:
            done = os.pwritev(self.fd, [page, body.data], slot * self.slot_bytes)
        except OSError as error:
            return reason_of(error)
        # The system cuts a write short only where the next byte would have failed for want of room.
        return None if done == self.slot_bytes else Reason.NO_SPACE

    def takes(self, memory: npt.NDArray[np.uint8]) -> bool:
        """Whether rows of `memory` [slots, stride] can be moved without a copy: whole pages, page-aligned."""
        aligned = memory.ctypes.data % PAGE == 0 and memory.strides[0] % PAGE == 0 and memory.strides[1] == 1
        return aligned and memory.shape[1] >= self._row_bytes

    def sync(self) -> None:
        """Brings what was written to the device. Raises OSError."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Closes the file; only when no call is under way, or it might hit a file opened later. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _page(self) -> memoryview:
        """The calling thread's header page, page-aligned."""
        page: memoryview | None = getattr(self._local, "page", None)
        if page is None:
            page = self._local.page = memoryview(mmap.mmap(-1, PAGE))
        return page


def _open_direct(path: Path, mode: int, page: memoryview) -> tuple[int, bool]:
    """The file opened with O_DIRECT if a first read through it goes well, else without."""
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_DIRECT)
        try:
            os.preadv(fd, [page], 0)
            return fd, True
        except OSError:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    log.warning("%s: the file system refuses O_DIRECT; the disk tier goes through the page cache", path)
    return os.open(path, mode | os.O_CLOEXEC), False
