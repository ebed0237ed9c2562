"""The CUDA copier: the copy engines for what is long, a kernel and a staging ring for what is short; rows in VRAM are
moved by the kernel alone.
"""

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy import driver
from cairn.copy.base import Copier, DeviceRows, RowMemory
from cairn.copy.paged import PagedKV, TokenSlots
from cairn.copy.pieces import Pieces, merge, piece_bytes, plan, vector_shape, whole_blocks, word_bytes
from cairn.copy.uploads import Uploads
from cairn.errors import InputError
from cairn.kv import KVGeometry

#: From here on a piece is worth a copy of its own: as fast as staging, without a kernel (H200).
BREAK_EVEN = 256 << 10
PATHS = ("auto", "pieces", "staged", "direct")
#: How short pieces come from a peer's VRAM: "staged" by the copy engines, or "direct" by a kernel that reads it.
PEER_PATH = "staged"
#: The first part of a call is small, so that the bus is busy while the rest is planned (about 0.2 ms a part); each
#: next one is larger.
_FIRST_BYTES, _GROWTH = 16 << 20, 2
#: Two buffers a direction are enough: a kernel is done with one long before the bus is done with the other. Each part
#: costs the host about 0.1 ms to enqueue, most of it to launch the kernel.
_STAGING_BYTES, _STAGING_BUFFERS = 48 << 20, 2
_PROGRAMS = 64
#: NVLink is eight times as fast as the bus, so that enqueueing a part must pay for more bytes.
_PEER_STAGING_BYTES, _PEER_FIRST_BYTES = 128 << 20, 64 << 20
#: Programs of a kernel that waits for VRAM itself, a few for each multiprocessor.
_DIRECT_PROGRAMS = 528


class Enqueued(NamedTuple):
    """A copy that was enqueued: the CUDA events before its first and behind its last byte."""

    begin: Any
    end: Any

    def synchronize(self) -> None:
        """Waits until it is over: asleep, but for the milliseconds that a peer's rows take."""
        self.end.synchronize()

    def seconds(self) -> float:
        """Waits until it is over; how long it took on the device."""
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) / 1e3


class _Lane:
    """One direction: a stream for copies, one for kernels, and a ring of staging buffers between them."""

    def __init__(self, torch: Any, device: Any, *, into_rows: bool) -> None:
        self.lock = Lock()
        self.copies, self.kernels = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event() for _ in range(_STAGING_BUFFERS)]
        self.freed = [torch.cuda.Event() for _ in range(_STAGING_BUFFERS)]
        self.uploads = Uploads(torch, device, self.kernels, fetched=into_rows)
        self._ring: Any = None
        self._next = 0
        self._torch, self._device = torch, device

    def staging(self, size: int) -> int:
        """How many bytes a staging buffer has: at least `size`."""
        if self._ring is None or self._ring.shape[1] < size:
            # A larger ring: what is still under way in the old one must not lose its memory.
            self.synchronize()
            wanted = max(size, _STAGING_BYTES)
            self._ring = self._torch.empty((_STAGING_BUFFERS, wanted), dtype=self._torch.uint8, device=self._device)
            # The allocator may have had this memory from work of another stream.
            self._torch.cuda.current_stream(self._device).synchronize()
        return int(self._ring.shape[1])

    def buffer(self) -> tuple[int, int]:
        """The next staging buffer's number and address."""
        self._next = (self._next + 1) % _STAGING_BUFFERS
        return self._next, self._ring[self._next].data_ptr()

    def mark(self, stream: Any, *, soon: bool = False) -> Any:
        """A new event behind what was enqueued on the stream. soon: who waits for it does not fall asleep."""
        event = self._torch.cuda.Event(enable_timing=True, blocking=not soon)
        event.record(stream)
        return event

    def synchronize(self) -> None:
        self.copies.synchronize()
        self.kernels.synchronize()


class CudaCopier(Copier):
    """Copies between a paged cache on a CUDA device and host memory, without waiting for it if asked to.

    Gathers run on streams of their own, as do scatters, so both directions of the bus are busy at once. `register` the
    rows' memory first: pinned memory is several times faster, and without it the enqueueing calls may block.
    path: how bytes move; "auto" chooses by the length of the pieces and by where the rows are. "pieces": one copy a
    piece, many in one call; "staged": whole rows to and from staging memory on the device, and a kernel between it and
    the paged cache; "direct": a kernel between the paged cache and rows in VRAM ("staged" for host memory).

    Thread-safe for disjoint rows. Holds staging memory on the device (96 MiB a direction) from `prepare` or the first
    staged copy on. Raises ImportError without torch and triton, StorageError when the driver refuses.
    """

    def __init__(self, geometry: KVGeometry, device: int = 0, path: str = "auto") -> None:
        super().__init__(geometry)
        if path not in PATHS:
            raise InputError(f"path={path!r}: must be one of {', '.join(PATHS)}")
        import torch

        self._torch: Any = torch
        self._device = torch.device("cuda", device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            self._context = driver.current_context()
        self._path = path
        self._store, self._load = (_Lane(torch, self._device, into_rows=stores) for stores in (True, False))
        self._pinned: dict[int, tuple[npt.NDArray[np.uint8], bool]] = {}

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        """Pins memory (uint8 [rows, stride], contiguous, at a page's start) until `release` or `close`; up to 0.5 s a
        GiB.
        """
        address = memory.ctypes.data
        if address not in self._pinned:
            with self._torch.cuda.device(self._device):
                driver.use(self._context)
                # A new dict: copies look into the old one meanwhile.
                self._pinned = {**self._pinned, address: (memory, driver.pin(address, memory.nbytes))}

    def release(self, memory: npt.NDArray[np.uint8]) -> None:
        """Waits for what is under way, and unpins memory that `register` has pinned. Idempotent."""
        address = memory.ctypes.data
        with self._store.lock, self._load.lock, self._torch.cuda.device(self._device):
            ours = self._pinned.get(address, (memory, False))[1]
            self._pinned = {at: entry for at, entry in self._pinned.items() if at != address}
            for lane in (self._store, self._load):
                lane.synchronize()
            if ours:
                driver.use(self._context)
                driver.unpin(address)

    def prepare(self, kv: PagedKV, *, direct: bool = False) -> None:
        """Takes the staging memory and compiles for `kv`, so that no request pays for either. direct: rows may be in
        VRAM.
        """
        none, span = np.empty(0, np.int64), range(self.geometry.layers)
        whole_blocks(kv, none, (0, 0), np.empty(0, np.int32), span, self.geometry)
        with self._torch.cuda.device(self._device):
            for lane, into_rows in ((self._store, True), (self._load, False)):
                with lane.lock:
                    lane.staging(self.row_geometry.block_bytes)
                    lane.uploads.prepare()
                    with self._torch.cuda.stream(lane.kernels):
                        self._kernel(lane, kv, none, span, into_rows)(0, 0, lane.buffer()[1])
                        if direct:
                            self._kernel(lane, kv, none, span, into_rows, none)(0, 0, 0)

    def close(self) -> None:
        """Waits for what is under way and unpins what `register` has pinned. Idempotent."""
        for lane in (self._store, self._load):
            lane.synchronize()
        for memory, _ in list(self._pinned.values()):
            self.release(memory)

    def gather(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        after = self._torch.cuda.current_stream(self._device).record_event()
        self.gather_async(kv, slots, memory, rows, layers, after).synchronize()

    def scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        self.start_scatter(kv, slots, memory, rows, layers)()

    def start_scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> Callable[[], None]:
        after = self._torch.cuda.current_stream(self._device).record_event()
        return self.scatter_async(kv, slots, memory, rows, layers, after).synchronize

    def gather_async(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
        after: Any = None,
    ) -> Enqueued:
        """As `gather`, enqueued behind the CUDA event `after`.

        Until it is over `kv` and `memory` must live, and neither may be written by others. Raises InputError, and
        StorageError when the driver refuses a part; then nothing is under way any more.
        """
        return self._enqueue(self._store, kv, slots, memory, rows, layers, after, into_rows=True)

    def scatter_async(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
        after: Any = None,
    ) -> Enqueued:
        """As `scatter`, enqueued; see `gather_async`."""
        return self._enqueue(self._load, kv, slots, memory, rows, layers, after, into_rows=False)

    def _enqueue(
        self,
        lane: _Lane,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None,
        after: Any,
        *,
        into_rows: bool,
    ) -> Enqueued:
        tokens = self.geometry.block_tokens
        if kv.device != self._device.index:
            raise InputError(f"KV cache on device {kv.device}: this copier serves CUDA device {self._device.index}")
        if len(slots) != len(rows) * tokens:
            raise InputError(f"{len(slots)} slots for {len(rows)} blocks: each block needs {tokens}")
        slots = np.ascontiguousarray(slots, np.int64)
        span = layers if layers is not None else range(self.geometry.layers)
        whole = self._whole(memory, kv, slots, rows, span)
        if whole is None:
            kv.check_slots(slots, tokens)
        pinned = isinstance(memory, DeviceRows) or self._is_pinned(memory)
        with self._torch.cuda.device(self._device), lane.lock:
            driver.use(self._context)
            if after is not None:
                lane.copies.wait_event(after)
                lane.kernels.wait_event(after)
            begin, device = lane.mark(lane.copies), isinstance(memory, DeviceRows)
            try:
                sizes = (_PEER_FIRST_BYTES, _PEER_STAGING_BYTES) if device else (_FIRST_BYTES, 0)
                if whole:
                    for first, stop in _parts(len(rows), int(whole.sizes[0]), begin=sizes[0]):
                        part = Pieces(*(array[first:stop] for array in whole))
                        driver.copy_batch(part, lane.copies.cuda_stream, into_rows=into_rows, pinned=pinned)
                    return Enqueued(begin, lane.mark(lane.copies, soon=device))
                address, stride = _placed(memory)
                starts = address + rows.astype(np.int64) * stride
                path = self._way(memory, kv, slots, span)
                if path == "pieces":
                    self._pieces(lane, kv, slots, starts, span, pinned, into_rows, sizes[0])
                    return Enqueued(begin, lane.mark(lane.copies, soon=device))
                if path == "direct":
                    self._direct(lane, kv, slots, starts, span, into_rows)
                    return Enqueued(begin, lane.mark(lane.kernels, soon=device))
                self._staged(lane, kv, slots, starts, span, pinned, into_rows, sizes)
                # What comes last in every part has waited for all else of it.
                return Enqueued(begin, lane.mark(lane.copies if into_rows else lane.kernels, soon=device))
            except BaseException:
                # What was enqueued before goes on, while the caller takes rows and pages for free.
                lane.synchronize()
                raise

    def _is_pinned(self, memory: npt.NDArray[np.uint8]) -> bool:
        first = memory.ctypes.data
        return any(at <= first and first + memory.nbytes <= at + own.nbytes for at, (own, _) in self._pinned.items())

    def _whole(
        self, memory: RowMemory, kv: PagedKV, slots: TokenSlots, rows: npt.NDArray[np.int32], span: range
    ) -> Pieces | None:
        """The copies, if each block is one that is long enough; None: it is to be looked what they are."""
        own = isinstance(memory, DeviceRows) and not memory.peer
        short = len(span) * self.geometry.layer_bytes < BREAK_EVEN
        if not len(rows) or self._path not in ("auto", "pieces") or own or short:
            return None
        rows = np.ascontiguousarray(rows, np.int32)
        return whole_blocks(kv, slots, _placed(memory), rows, span, self.geometry)

    def _way(self, memory: RowMemory, kv: PagedKV, slots: TokenSlots, span: range) -> str:
        """How bytes move: one of PATHS, but "auto"."""
        if not isinstance(memory, DeviceRows):
            short = "staged"
        elif memory.peer:
            short = PEER_PATH
        else:
            short = "direct"
        if self._path != "auto":
            return "staged" if self._path == "direct" and not isinstance(memory, DeviceRows) else self._path
        if short == "direct":
            return short
        long = len(slots) and piece_bytes(kv, slots, span, self.geometry) >= BREAK_EVEN
        return "pieces" if long else short

    def _pieces(
        self,
        lane: _Lane,
        kv: PagedKV,
        slots: TokenSlots,
        starts: npt.NDArray[np.int64],
        span: range,
        pinned: bool,
        into_rows: bool,
        begin: int,
    ) -> None:
        """One copy a piece. begin: bytes of the first part."""
        tokens = self.geometry.block_tokens
        for first, stop in _parts(len(starts), len(span) * self.geometry.layer_bytes, begin=begin):
            pieces = plan(kv, slots[first * tokens : stop * tokens], starts[first:stop], span, self.geometry)
            driver.copy_batch(pieces, lane.copies.cuda_stream, into_rows=into_rows, pinned=pinned)

    def _staged(
        self,
        lane: _Lane,
        kv: PagedKV,
        slots: TokenSlots,
        starts: npt.NDArray[np.int64],
        span: range,
        pinned: bool,
        into_rows: bool,
        sizes: tuple[int, int],
    ) -> None:
        """Rows move whole between their memory and staging, while a kernel works on the parts before and behind.

        sizes: bytes of the first part, and of the largest if the staging buffers must be larger for it.
        """
        tokens, layer_bytes = self.geometry.block_tokens, self.row_geometry.layer_bytes
        width = len(span) * layer_bytes
        if into_rows and (holes := (slots.reshape(-1, tokens) < 0).any(axis=1)).any():
            # A staged row arrives whole: it would overwrite the bytes of tokens that are to be left as they are.
            left_out = slots.reshape(-1, tokens)[holes].reshape(-1)
            self._pieces(lane, kv, left_out, starts[holes], span, pinned, into_rows=True, begin=sizes[0])
            slots, starts = slots.reshape(-1, tokens)[~holes].reshape(-1), starts[~holes]
        most = lane.staging(max(width, sizes[1]))
        first_stream, last_stream = (lane.kernels, lane.copies) if into_rows else (lane.copies, lane.kernels)
        with self._torch.cuda.stream(lane.kernels):
            kernel = self._kernel(lane, kv, slots, span, into_rows)
            for first, stop in _parts(len(starts), width, most, sizes[0]):
                number, staging = lane.buffer()
                outside = starts[first:stop] + span.start * layer_bytes
                inside = staging + np.arange(stop - first, dtype=np.int64) * width
                copies = merge(inside, outside, np.full(stop - first, width, np.int64))
                first_stream.wait_event(lane.freed[number])
                if into_rows:
                    kernel(first, stop, staging)
                else:
                    driver.copy_batch(copies, lane.copies.cuda_stream, into_rows=False, pinned=pinned)
                lane.filled[number].record(first_stream)
                last_stream.wait_event(lane.filled[number])
                if into_rows:
                    driver.copy_batch(copies, lane.copies.cuda_stream, into_rows=True, pinned=pinned)
                else:
                    kernel(first, stop, staging)
                lane.freed[number].record(last_stream)

    def _direct(
        self,
        lane: _Lane,
        kv: PagedKV,
        slots: TokenSlots,
        starts: npt.NDArray[np.int64],
        span: range,
        into_rows: bool,
    ) -> None:
        """One kernel between the paged cache and rows that the device reaches by itself."""
        with self._torch.cuda.stream(lane.kernels):
            first = span.start * self.geometry.layer_bytes
            self._kernel(lane, kv, slots, span, into_rows, starts + first)(0, len(starts), 0)

    def _kernel(
        self,
        lane: _Lane,
        kv: PagedKV,
        slots: TokenSlots,
        span: range,
        into_rows: bool,
        starts: npt.NDArray[np.int64] | None = None,
    ) -> Callable[[int, int, int], None]:
        """The kernel for blocks first..stop of `slots` and the address of their staged rows; on the current stream.

        starts: int64 [blocks], rows that are not staged but stand there.
        """
        from cairn.copy import triton_kernel

        heads, head_bytes = vector_shape(kv, self.geometry)
        tokens, width = self.geometry.block_tokens, len(span) * self.geometry.layer_bytes
        bases = np.ascontiguousarray(kv.bases[span.start : span.stop].reshape(-1))
        scattered = np.empty(0, np.int64) if starts is None else starts
        table = lane.uploads.send(bases, scattered, slots)
        word = word_bytes(kv, np.append(scattered, width), self.geometry)
        lead = len(bases) + len(scattered)

        def run(first: int, stop: int, staging: int) -> None:
            triton_kernel.move(
                table[: len(bases)],
                table[lead + first * tokens :],
                staging if starts is None else table[len(bases) + first : lead],
                blocks=stop - first,
                strides=(kv.page_stride, kv.token_stride, kv.head_stride, width),
                page_tokens=kv.page_tokens,
                block_tokens=tokens,
                heads=heads,
                head_bytes=head_bytes,
                word=word,
                programs=_PROGRAMS if starts is None else _DIRECT_PROGRAMS,
                into_rows=into_rows,
            )

        return run


def _placed(memory: RowMemory) -> tuple[int, int]:
    """Address and stride of rows."""
    if isinstance(memory, DeviceRows):
        return memory.address, memory.stride
    return memory.ctypes.data, memory.strides[0]


def _parts(blocks: int, width: int, most: int | None = None, begin: int | None = None) -> Iterator[tuple[int, int]]:
    """Cuts `blocks` blocks of `width` bytes into parts that grow from `begin` up to `most` bytes: (first, stop) of
    each.
    """
    first, size = 0, begin or _FIRST_BYTES
    while first < blocks:
        stop = min(blocks, first + max(1, (size if most is None else min(size, most)) // width))
        yield first, stop
        first, size = stop, size * _GROWTH
