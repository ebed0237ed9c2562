"""K and V of a layer as tensors: in vLLM's pages, and in the arena's rows."""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cairn.codec.quantized import Quantizer
from cairn.errors import GeometryError
from cairn.kv import KVGeometry, Layout

UNKNOWN: Final = "the order of values in this attention backend's pages is not known"
#: Numbers up to 256 are exact in every dtype; their remainders by these two tell up to 60,491 values apart.
_MODULI: Final = (251, 241)
#: A quantized row's layers stand by themselves: one can be taken for the first.
_ONE: Final = range(1)


class Pages(NamedTuple):
    """K and V of one layer of some blocks: [pages, page_tokens, heads, dim], any strides."""

    keys: Any
    values: Any

    @classmethod
    def of(cls, cache: Any, geometry: KVGeometry, layout: Layout) -> "Pages":
        """Views of vLLM's tensor of one layer. Raises GeometryError where the order of its values is not known."""
        tokens, heads, dim = geometry.block_tokens, geometry.kv_heads, geometry.head_dim
        if cache.dim() == 5:
            return cls(*cache.unbind(0 if cache.shape[0] == 2 else 1))
        if cache.dim() == 4 and layout.page != "vllm_cpu" and cache.shape[1:] == (heads, tokens, 2 * dim):
            return cls(*cache.transpose(1, 2).split(dim, dim=-1))
        if cache.dim() != 4 or layout.page != "vllm_cpu":
            raise GeometryError(UNKNOWN)
        planes = cache.view(len(cache), heads, 2, tokens * dim)
        keys = planes[:, :, 0].view(-1, heads, dim, tokens).permute(0, 3, 1, 2)
        return cls(keys, planes[:, :, 1].view(-1, heads, tokens, dim).permute(0, 2, 1, 3))


class ArenaRows:
    """K and V of the arena's rows, layer by layer.

    memory: uint8 [rows, bytes], in host memory. dtype: of K and V. layout: of the rows. opaque: as `PagedKV` has it.
    quantizer: what the rows are made by, in the place of both.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        dtype: Any,
        geometry: KVGeometry,
        layout: Layout,
        *,
        opaque: bool,
        quantizer: Quantizer | None,
    ) -> None:
        self._memory = memory
        self._dtype = dtype
        self._geometry = geometry
        self._layout = layout
        self._opaque = opaque
        self._quantizer = quantizer

    def read(self, layer: int, rows: list[int]) -> Pages:
        """A copy of a layer of these rows."""
        held = self._of(layer)
        if not self._quantizer:
            return self._pages(held[rows])
        blocks = self._blocks(len(rows))
        for block, row in zip(blocks, rows, strict=True):
            self._quantizer.decode(held[row], block, _ONE)
        return self._pages(blocks)

    def write(self, layer: int, rows: list[int], pages: Pages) -> None:
        """The reverse. pages: on any device."""
        held, blocks = self._of(layer), self._blocks(len(rows))
        for view, plane in zip(self._pages(blocks), pages, strict=True):
            view.copy_(plane)
        if not self._quantizer:
            held[rows] = blocks
            return
        for block, row in zip(blocks, rows, strict=True):
            self._quantizer.encode(block, held[row], _ONE)

    def _of(self, layer: int) -> npt.NDArray[np.uint8]:
        size = (self._quantizer.stored if self._quantizer else self._geometry).layer_bytes
        return self._memory[:, layer * size : (layer + 1) * size]

    def _blocks(self, count: int) -> npt.NDArray[np.uint8]:
        return np.empty((count, self._geometry.layer_bytes), np.uint8)

    def _pages(self, blocks: npt.NDArray[np.uint8]) -> Pages:
        """Views of a layer of plain blocks."""
        tokens, heads = self._geometry.block_tokens, self._geometry.kv_heads
        values = torch.from_numpy(blocks).view(self._dtype)
        if not self._quantizer and self._layout.page == "vllm_cpu":
            return Pages.of(values.view(len(values), heads, tokens, -1), self._geometry, self._layout)
        if not self._quantizer and self._opaque:
            return Pages(*values.view(len(values), tokens, heads, -1).split(self._geometry.head_dim, dim=-1))
        return Pages(*values.view(len(values), 2, tokens, heads, -1).unbind(1))


def prove_order(cache: Any, geometry: KVGeometry, attention: Any) -> None:
    """Lets a layer's own attention write numbered values into page 0, and looks whether `Pages` finds them in order.

    cache: the layer's tensor, which nobody uses yet; it is put back. Raises GeometryError where they are not.
    """
    pages = Pages.of(cache, geometry, Layout())
    numbers = torch.arange(2 * pages.keys[0].numel(), device=cache.device).view(2, *pages.keys.shape[1:])
    before = cache.select(0 if len(pages.keys) == len(cache) else 1, 0).clone()
    try:
        for modulus in _MODULI:
            keys, values = (numbers % modulus).to(cache.dtype)
            slots = torch.arange(len(keys), device=cache.device)
            attention.impl.do_kv_cache_update(attention, keys, values, cache, slots)
            if not (torch.equal(pages.keys[0], keys) and torch.equal(pages.values[0], values)):
                raise GeometryError(UNKNOWN)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise GeometryError(f"{UNKNOWN}: {error}") from None
    finally:
        cache.select(0 if len(pages.keys) == len(cache) else 1, 0).copy_(before)
