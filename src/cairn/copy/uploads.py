"""Tables for kernels on their way to the device, through memory that is taken once."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.copy import driver
from cairn.copy.pieces import Pieces

#: Numbers that a buffer has room for: the slots of 262,144 tokens.
_NUMBERS = 1 << 18
#: Calls whose tables may be on their way at a time before more pinned memory is taken.
_BUFFERS = 2


class Uploads:
    """One stream's tables of int64 on the device, the latest alone. For who holds the lane's lock.

    fetched: a kernel reads them out of host memory. A copy would wait for loads of gigabytes that were enqueued before,
    as all copies to the device wait for one another, and what is stored would wait with it.

    torch takes pinned memory anew for each length, and whenever the last piece of it is still on its way; that costs
    the model's thread up to 3 ms each time (an H200's host). Here it is taken by `prepare`, and again only for more.
    """

    def __init__(self, torch: Any, device: Any, stream: Any, *, fetched: bool) -> None:
        self._torch, self._device, self._stream, self._fetched = torch, device, stream, fetched
        self._buffers: list[tuple[Any, Any]] = []  # pinned tensor, event behind its last copy
        self._table: Any = None

    def prepare(self) -> None:
        while len(self._buffers) < _BUFFERS:
            self._take(_NUMBERS)

    def send(self, *parts: npt.NDArray[np.int64]) -> Any:
        """A tensor on the device with these, one behind the other, for work on the stream until the next is sent."""
        size = sum(map(len, parts))
        pinned, sent = next((one for one in self._buffers if len(one[0]) >= size and one[1].query()), None) or (
            self._take(size)
        )
        if self._table is None or len(self._table) < size:
            # Of the stream's own memory: what still reads the old table comes before whatever gets its place.
            with self._torch.cuda.stream(self._stream):
                self._table = self._torch.empty((len(pinned),), dtype=self._torch.int64, device=self._device)
        np.concatenate(parts, out=pinned.numpy()[:size])
        table = self._table[:size]
        if self._fetched:
            from cairn.copy import triton_kernel

            with self._torch.cuda.stream(self._stream):
                triton_kernel.fetch(table, pinned.data_ptr())
        else:
            run = (np.array([number], np.int64) for number in (table.data_ptr(), pinned.data_ptr(), 8 * size))
            driver.copy_batch(Pieces(*run), self._stream.cuda_stream, into_rows=False, pinned=True)
        sent.record(self._stream)
        return table

    def _take(self, size: int) -> tuple[Any, Any]:
        """More pinned memory, in the place of what is too short and has arrived."""
        self._buffers = [one for one in self._buffers if len(one[0]) >= size or not one[1].query()]
        numbers = max(_NUMBERS, 1 << (size - 1).bit_length())
        taken = self._torch.empty((numbers,), dtype=self._torch.int64, pin_memory=True), self._torch.cuda.Event()
        self._buffers.append(taken)
        return taken
