"""The CUDA copier for quantized rows: a kernel encodes and decodes between the paged cache and staged rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.codec.quantized import Quantizer
from cairn.copy.base import RowMemory
from cairn.copy.cpu_quantized import check_whole
from cairn.copy.cuda import CudaCopier, Enqueued
from cairn.copy.paged import PagedKV, TokenSlots
from cairn.errors import GeometryError

#: Programs of a kernel, of one warp each, eight for each multiprocessor: keeps ahead of the bus many times over.
PROGRAMS = 1056


class QuantizedCudaCopier(CudaCopier):
    """As `CudaCopier`, all staged: only quantized bytes cross the bus. A gathered block has no negative slots."""

    def __init__(self, quantizer: Quantizer, device: int = 0) -> None:
        super().__init__(quantizer.geometry, device, "staged")
        self.row_geometry = quantizer.stored
        self._quantizer = quantizer

    def prepare(self, kv: PagedKV, *, direct: bool = False) -> None:
        """As `CudaCopier`. Raises GeometryError for pages whose values cannot be read."""
        if kv.opaque:
            raise GeometryError("pages of this attention backend are opaque: set storage.cpu.codec to none")
        super().prepare(kv, direct=direct)

    def _enqueue(
        self, lane: Any, kv: PagedKV, slots: TokenSlots, memory: RowMemory, *arguments: Any, into_rows: bool
    ) -> Enqueued:
        check_whole(slots, memory, into_rows)
        return super()._enqueue(lane, kv, slots, memory, *arguments, into_rows=into_rows)

    def _kernel(
        self,
        lane: Any,
        kv: PagedKV,
        slots: TokenSlots,
        span: range,
        into_rows: bool,
        starts: npt.NDArray[np.int64] | None = None,  # noqa: ARG002 - rows in VRAM are refused
    ) -> Callable[[int, int, int], None]:
        from cairn.copy import triton_quantized

        bases = np.ascontiguousarray(kv.bases[span.start : span.stop].reshape(-1))
        table = lane.uploads.send(bases, slots)
        tokens = self.geometry.block_tokens
        strides = kv.page_stride, kv.token_stride, kv.head_stride
        places = int(np.bitwise_or.reduce(np.array([*bases, *strides], np.int64)))
        if places % (2 * self.geometry.element_bytes):
            raise GeometryError("KV cache at odd addresses: storage.cpu.codec needs pairs of elements; set it to none")

        def run(first: int, stop: int, staging: int) -> None:
            triton_quantized.move(
                table[: len(bases)],
                table[len(bases) + first * tokens :],
                staging,
                self._quantizer,
                blocks=stop - first,
                layers=len(span),
                strides=strides,
                page_tokens=kv.page_tokens,
                aligned=places % triton_quantized.ALIGNMENT == 0,
                programs=PROGRAMS,
                into_rows=into_rows,
            )

        return run
