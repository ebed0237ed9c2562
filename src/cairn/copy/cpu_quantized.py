"""The CPU copier for quantized rows: blocks pass through a scratch row, where they are canonical."""

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from cairn.codec.quantized import Quantizer
from cairn.copy.base import Copier, RowMemory
from cairn.copy.cpu import CpuCopier
from cairn.copy.paged import PagedKV, TokenSlots
from cairn.copy.progress import Progress
from cairn.errors import GeometryError, InputError
from cairn.kv import CANONICAL, KVGeometry, Layout

_FIRST, _ONLY = np.zeros(1, np.int32), slice(0, 1)


class QuantizedCpuCopier(CpuCopier):
    """As `CpuCopier`, but a block is quantized as it is gathered. A gathered block has no negative slots.

    page: the order of values in opaque pages, if the paged cache has such; they are refused (GeometryError) unless it
    is known.
    """

    share_bytes = 16 << 20  # decoding takes several times as long as copying

    def __init__(self, quantizer: Quantizer, threads: int = 1, page: Layout = CANONICAL) -> None:
        super().__init__(quantizer.geometry, threads)
        self.row_geometry = quantizer.stored
        self._quantizer = quantizer
        self._layout = Layout(page.page)
        self._layer = replace(quantizer.geometry, layers=1)
        # Compiled now, so that no request waits for it.
        layer, row = np.zeros(self._layer.block_bytes, np.uint8), np.zeros(quantizer.stored.layer_bytes, np.uint8)
        quantizer.encode(layer, row, range(1))
        quantizer.decode(row, layer, range(1))

    def prepare(self, kv: PagedKV, *, direct: bool = False) -> None:  # noqa: ARG002 - rows in VRAM are not quantized
        """Raises GeometryError for pages whose values cannot be read."""
        if kv.opaque != (self._layout != CANONICAL):
            raise GeometryError("pages of this attention backend are opaque: set storage.cpu.codec to none")

    def scatter_layers(
        self, kv: PagedKV, slots: TokenSlots, memory: RowMemory, rows: npt.NDArray[np.int32], progress: Progress
    ) -> None:
        """In groups, as blocks are decoded from Python."""
        Copier.scatter_layers(self, kv, slots, memory, rows, progress)

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
        self.prepare(kv)
        check_whole(slots, memory, into_rows)
        raw = np.empty((1, self.geometry.block_bytes), np.uint8)
        block = raw[0] if self._layout == CANONICAL else np.empty_like(raw[0])
        for row, of_block in zip(rows[part], slots.reshape(len(rows), -1)[part], strict=True):
            if into_rows:
                super()._share(kv, of_block, raw, _FIRST, _ONLY, span, into_rows)
                self._reorder(raw[0], block, span, into_rows)
                self._quantizer.encode(block, memory[row], span)
            else:
                self._quantizer.decode(memory[row], block, span)
                self._reorder(raw[0], block, span, into_rows)
                super()._share(kv, of_block, raw, _FIRST, _ONLY, span, into_rows)

    def _reorder(self, raw: npt.NDArray[np.uint8], block: npt.NDArray[np.uint8], span: range, into_rows: bool) -> None:
        if block is raw:
            return
        move = (
            self._layout.to_canonical if into_rows else lambda own, whole, g: self._layout.from_canonical(whole, own, g)
        )
        size = self.geometry.layer_bytes
        for at in range(span.start * size, span.stop * size, size):
            move(raw[at : at + size], block[at : at + size], self._layer)


def cpu_copier(
    geometry: KVGeometry, quantizer: Quantizer | None, threads: int = 1, page: Layout = CANONICAL
) -> CpuCopier:
    """The copier for rows that `quantizer` makes; None: plain ones. page: as for `QuantizedCpuCopier`."""
    return QuantizedCpuCopier(quantizer, threads, page) if quantizer else CpuCopier(geometry, threads)


def check_whole(slots: TokenSlots, memory: RowMemory, into_rows: bool) -> None:
    """Raises InputError for what cannot be done with quantized rows."""
    if not isinstance(memory, np.ndarray):
        raise InputError("rows in VRAM are not quantized: set storage.cpu.codec to none")
    if into_rows and len(slots) and slots.min() < 0:
        raise InputError("a quantized block is stored whole: none of its slots may be negative")
