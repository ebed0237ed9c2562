"""The CPU copier: one numba kernel that moves the largest pieces both sides have in one run."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from threading import Lock
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cairn.copy.base import Copier, DeviceRows, RowMemory
from cairn.copy.cores import roam, usable_cores
from cairn.copy.memory import move_bytes, stream_lines
from cairn.copy.paged import PagedKV, TokenSlots
from cairn.copy.progress import Progress
from cairn.errors import InputError
from cairn.jit import fence, kernel, load_acquire, store_release
from cairn.kv import KVGeometry

#: Below this a piece is copied through the caches: streaming would not pay for its ragged ends.
_SMALL = 256
_LINES = 128
_ALIGNMENT = 32

#: What kernels are told: the paged cache (bases, page_tokens, strides of pages, tokens and heads), slots, the rows'
#: memory (address, stride), rows, and a block's shape (tokens, heads, bytes of a head).
_Sides = tuple[
    npt.NDArray[np.int64], int, int, int, int, TokenSlots, int, int, npt.NDArray[np.int32], tuple[int, int, int]
]


@kernel
def _piece(outside: int, inside: int, count: int, into_rows: bool) -> None:
    target, source = (inside, outside) if into_rows else (outside, inside)
    if count < _SMALL:
        move_bytes(target, source, count)
        return
    head = -target % _ALIGNMENT
    body = (count - head) // _LINES * _LINES
    if head:
        move_bytes(target, source, head)
    stream_lines(target + head, source + head, body)
    if head + body < count:
        move_bytes(target + head + body, source + head + body, count - head - body)


@kernel
def _in_one_run(slots: TokenSlots, page_tokens: int, pages_join: bool) -> bool:
    """Whether a block's tokens stand one behind the other in the paged cache."""
    if slots[0] < 0:
        return False
    for t in range(1, len(slots)):
        if slots[t] != slots[0] + t:
            return False
    return pages_join or slots[0] // page_tokens == slots[len(slots) - 1] // page_tokens


@kernel
def _move(sides: _Sides, first_layer: int, last_layer: int, into_rows: bool) -> None:
    bases, page_tokens, page_stride, token_stride, head_stride, slots, memory, row_stride, rows, shape = sides
    block_tokens, heads, head_bytes = shape
    planes = bases.shape[1]
    vector = heads * head_bytes
    vectors_packed = heads == 1 or head_stride == head_bytes
    tokens_packed = vectors_packed and token_stride == vector
    pages_join = page_stride == page_tokens * token_stride
    for i in range(len(rows)):
        of_block = slots[i * block_tokens : (i + 1) * block_tokens]
        whole = tokens_packed and _in_one_run(of_block, page_tokens, pages_join)
        row = memory + np.int64(rows[i]) * row_stride
        for layer in range(first_layer, last_layer):
            for plane in range(planes):
                inside = row + (layer * planes + plane) * block_tokens * vector
                base = bases[layer, plane]
                if whole:
                    outside = base + of_block[0] // page_tokens * page_stride + of_block[0] % page_tokens * token_stride
                    _piece(outside, inside, block_tokens * vector, into_rows)
                    continue
                for t in range(block_tokens):
                    slot = of_block[t]
                    if slot < 0:
                        continue
                    outside = base + slot // page_tokens * page_stride + slot % page_tokens * token_stride
                    if vectors_packed:
                        _piece(outside, inside + t * vector, vector, into_rows)
                    else:
                        for head in range(heads):
                            at = inside + t * vector + head * head_bytes
                            _piece(outside + head * head_stride, at, head_bytes, into_rows)
    fence()


@kernel
def _move_layers(sides: _Sides, layers: int, stop: int, told: int) -> None:
    """Rows -> paged cache, layer after layer; stop, told: see `Progress.split`."""
    for layer in range(layers):
        if load_acquire(stop):
            return
        _move(sides, layer, layer + 1, False)
        store_release(told, layer + 1)


class CpuCopier(Copier):
    """Copies with `threads` threads (the caller's own when 1, or once closed), each taking an equal share of the
    blocks. A load beside a model that computes leaves it half of the cores, and takes one thread unless the shares are
    large.
    """

    #: Beside a model, a thread more pays from so many bytes on, which one copies in 6 to 10 ms: each takes the GIL from
    #: the model's own thread, which costs the model about 0.3 ms.
    share_bytes: ClassVar[int] = 64 << 20

    def __init__(self, geometry: KVGeometry, threads: int = 1) -> None:
        super().__init__(geometry)
        self._threads = threads
        self._half = len(usable_cores()) // 2
        self._pool = ThreadPoolExecutor(threads, "cairn-copy", roam) if threads > 1 else None
        self._closing = Lock()

    def gather(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        self._run(kv, slots, memory, rows, layers, into_rows=True)

    def scatter(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None = None,
    ) -> None:
        self._run(kv, slots, memory, rows, layers, into_rows=False)

    def scatter_layers(
        self, kv: PagedKV, slots: TokenSlots, memory: RowMemory, rows: npt.NDArray[np.int32], progress: Progress
    ) -> None:
        """All in one go for each thread, which takes the GIL but once."""
        memory, slots = self._checked(kv, slots, memory, rows)
        parts = self._parts(rows, self._beside(len(rows) * self.geometry.block_bytes))
        stop, told = progress.split(len(parts))

        def move(part: int) -> None:
            sides = self._sides(kv, slots, memory, rows, parts[part])
            _move_layers(sides, self.geometry.layers, stop, told[part])

        self._each(len(parts), move)

    def close(self) -> None:
        with self._closing:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()

    def _run(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: RowMemory,
        rows: npt.NDArray[np.int32],
        layers: range | None,
        *,
        into_rows: bool,
    ) -> None:
        memory, slots = self._checked(kv, slots, memory, rows)
        threads = self._threads
        if layers is not None and not into_rows:
            threads = self._beside(len(rows) * len(layers) * self.geometry.layer_bytes)
        parts = self._parts(rows, threads)
        span = layers if layers is not None else range(self.geometry.layers)
        self._each(len(parts), lambda part: self._share(kv, slots, memory, rows, parts[part], span, into_rows))

    def _checked(
        self, kv: PagedKV, slots: TokenSlots, memory: RowMemory, rows: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.uint8], TokenSlots]:
        """Memory and slots for a kernel, which checks nothing."""
        if isinstance(memory, DeviceRows) or kv.device >= 0:
            raise InputError("the CPU copier cannot reach a GPU's memory: name the GPU as storage.vram.device")
        tokens = self.geometry.block_tokens
        if len(slots) != len(rows) * tokens:
            raise InputError(f"{len(slots)} slots for {len(rows)} blocks: each block needs {tokens}")
        kv.check_slots(slots, tokens)
        return memory, np.ascontiguousarray(slots, np.int64)

    def _beside(self, size: int) -> int:
        """How many threads copy so many bytes beside a model that computes."""
        return max(1, min(self._threads, self._half, size // self.share_bytes))

    def _parts(self, rows: npt.NDArray[np.int32], threads: int) -> list[slice]:
        """Equal shares of the rows, if each has two at least."""
        if len(rows) < 2 * threads:
            threads = 1
        cuts = np.linspace(0, len(rows), threads + 1).astype(int)
        return [slice(first, stop) for first, stop in pairwise(cuts)]

    def _each(self, parts: int, move: Callable[[int], None]) -> None:
        """Moves parts 0..parts - 1, at once where there are threads for it."""
        shares: list[Future[None]] = []
        with self._closing:
            if self._pool and parts > 1:
                shares = [self._pool.submit(move, part) for part in range(parts)]
        if not shares:
            for part in range(parts):
                move(part)
        wait(shares)  # also when one fails: the caller takes rows and pages for free then
        for share in shares:
            share.result()

    def _share(
        self,
        kv: PagedKV,
        slots: TokenSlots,
        memory: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int32],
        part: slice,
        span: range,
        into_rows: bool,
    ) -> None:
        _move(self._sides(kv, slots, memory, rows, part), span.start, span.stop, into_rows)

    def _sides(
        self, kv: PagedKV, slots: TokenSlots, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int32], part: slice
    ) -> _Sides:
        """Of a part of the rows."""
        g = self.geometry
        # Opaque pages are one run of `layer_bytes` a layer: as if they had one head of that many bytes a token.
        opaque_vector = g.layer_bytes // g.block_tokens
        heads, head_bytes = (1, opaque_vector) if kv.opaque else (g.kv_heads, g.head_dim * g.element_bytes)
        return (
            kv.bases,
            kv.page_tokens,
            kv.page_stride,
            kv.token_stride,
            kv.head_stride,
            slots[part.start * g.block_tokens : part.stop * g.block_tokens],
            memory.ctypes.data,
            memory.strides[0],
            rows[part],
            (g.block_tokens, heads, head_bytes),
        )
