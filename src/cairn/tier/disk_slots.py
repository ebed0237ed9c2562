"""The data file of a cache directory: fixed slots of one header page and one block, moved without a copy.

A run of slots is moved by a single preadv or pwritev over [the worker's header page, the row of the caller's memory,
the next page, the next row, ...], so that the payload is never copied by the CPU; O_DIRECT keeps it out of the page
cache as well. The checksum is made and checked in the same worker: xxhash frees the GIL and sums at several times the
speed of an NVMe device.
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

#: Blocks in neighbouring slots are moved together up to these sizes: a larger read only makes others wait, and a larger
#: write saves some of the CPU time that a block costs.
_READ_RUN_BYTES: Final = 2 << 20
_WRITE_RUN_BYTES: Final = 8 << 20
_RUN_BLOCKS: Final = 32

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
        #: How many blocks of neighbouring slots are best moved together.
        self.read_run_blocks = max(1, min(_READ_RUN_BYTES // self._row_bytes, _RUN_BLOCKS))
        self.write_run_blocks = max(1, min(_WRITE_RUN_BYTES // self._row_bytes, _RUN_BLOCKS))
        self._local = threading.local()
        self.fd, self.direct = _open_direct(path, os.O_RDWR if writable else os.O_RDONLY, self._pages()[0])

    def read(self, slot: int, keys: list[bytes], rows: list[Octets]) -> list[Reason | None]:
        """Fills rows, each of the block's bytes rounded up to pages, with the blocks `keys` from neighbouring slots,
        and proves that they are those blocks.

        keys: at most `read_run_blocks`. For what is anything else the reason is returned, and the row holds anything.
        """
        pages = self._pages()
        try:
            got = os.preadv(self.fd, self._buffers(pages, rows), slot * self.slot_bytes)
        except OSError as error:
            if len(keys) == 1:
                return [reason_of(error)]
            # One bad sector is not to cost the whole run.
            return [self.read(slot + i, [keys[i]], [rows[i]])[0] for i in range(len(keys))]
        whole = got // self.slot_bytes
        return [
            self._prove(page, key, row) if i < whole else Reason.CORRUPT
            for i, (page, key, row) in enumerate(zip(pages, keys, rows, strict=False))
        ]

    def sum(self, row: Octets) -> bytes:
        """The checksum of the block in `row`, for `write`."""
        return checksum_of(row[: self.block_bytes])

    def write(
        self, slot: int, keys: list[bytes], namespace: bytes, rows: list[Octets], checksums: list[bytes]
    ) -> Reason | None:
        """Puts the blocks in `rows` and their frames into neighbouring slots; when None, the system has it all.

        keys: at most `write_run_blocks`. checksums: of `sum`, or empty where it has not been called.
        """
        pages = self._pages()
        for page, key, row, checksum in zip(pages, keys, rows, checksums, strict=False):
            block = row[: self.block_bytes]
            page[:] = self._framer.pack(key, namespace, len(block), checksum or checksum_of(block), size=PAGE)
        try:
            done = os.pwritev(self.fd, self._buffers(pages, rows), slot * self.slot_bytes)
        except OSError as error:
            return reason_of(error)
        # The system cuts a write short only where the next byte would have failed for want of room.
        return None if done == len(rows) * self.slot_bytes else Reason.NO_SPACE

    def _prove(self, page: memoryview, key: bytes, row: Octets) -> Reason | None:
        header = self._framer.expect(page, key)
        if not isinstance(header, FrameHeader):
            return header
        block = row[: self.block_bytes]
        sound = header.verifies(block) and self._framer.codec.decode(block, block)
        return None if sound else Reason.CORRUPT

    def _buffers(self, pages: list[memoryview], rows: list[Octets]) -> list[memoryview]:
        return [part for page, row in zip(pages, rows, strict=False) for part in (page, row[: self._row_bytes].data)]

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

    def _pages(self) -> list[memoryview]:
        """The calling thread's header pages, page-aligned, one for each block of a run."""
        pages: list[memoryview] | None = getattr(self._local, "pages", None)
        if pages is None:
            memory = memoryview(mmap.mmap(-1, self.write_run_blocks * PAGE))
            pages = self._local.pages = [memory[i * PAGE : (i + 1) * PAGE] for i in range(self.write_run_blocks)]
        return pages


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
