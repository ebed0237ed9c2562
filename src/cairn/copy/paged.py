"""An engine's KV cache as addresses and strides, whatever tensors and dimension order it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry

#: Slots of tokens in a paged cache, int64 [tokens]: page * page_tokens + offset; negative: leave this token out.
TokenSlots = npt.NDArray[np.int64]

LAYOUTS = ("nhd", "hnd", "transformers", "mla", "vllm_cpu")


class _View(NamedTuple):
    """One tensor: where it starts, its shape, and its strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One engine's KV cache: where token t of (layer, plane, head) stands.

    bases: int64 [layers, planes], the address of page 0; a token in slot s stands at
    base + s // page_tokens * page_stride + s % page_tokens * token_stride + head * head_stride, head_dim elements in a
    row. Strides in bytes. slots: how many tokens it has room for. opaque: pages are moved whole, their inside is the
    engine's.

    `owner` keeps the tensors alive. Reading and writing it is as thread-safe as the tensors are: the engine must not
    use the slots of a transfer before that is over.
    """

    bases: npt.NDArray[np.int64]
    page_tokens: int
    page_stride: int
    token_stride: int
    head_stride: int
    slots: int
    opaque: bool
    owner: Any

    @classmethod
    def from_tensors(cls, tensors: Sequence[Any], layout: str, geometry: KVGeometry) -> "PagedKV":
        """`tensors`: one entry a layer, torch (CPU) or numpy, by `layout`:

        nhd           [2, pages, page_tokens, heads, dim], or a pair (K, V) of [pages, page_tokens, heads, dim]
        hnd           [2, pages, heads, page_tokens, dim], or a pair (K, V) of [pages, heads, page_tokens, dim]
        transformers  a pair (K, V) of [1, heads, tokens, dim]
        mla           [pages, page_tokens, dim], the latent and the RoPE part in one
        vllm_cpu      [pages, heads, page_tokens, 2 * dim], moved as opaque pages of `geometry.block_tokens`

        Raises GeometryError if shapes, dtypes or strides do not fit `geometry` or differ between layers.
        """
        if layout not in LAYOUTS:
            raise GeometryError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
        if len(tensors) != geometry.layers:
            raise GeometryError(f"{len(tensors)} layers of KV tensors: the geometry has {geometry.layers}")
        views = [_planes(entry, layout, geometry) for entry in tensors]
        first = views[0][0]
        for layer, planes in enumerate(views):
            for view in planes:
                if view.shape != first.shape or view.strides != first.strides:
                    raise GeometryError(
                        f"layer {layer}: shape {view.shape}, strides {view.strides} differ from layer 0's"
                    )
                if view.element_bytes != geometry.element_bytes:
                    raise GeometryError(f"layer {layer}: {view.element_bytes}-byte elements: {geometry.dtype} expected")
        bases = np.array([[view.address for view in planes] for planes in views], np.int64)
        pages, page_tokens, page_stride, token_stride, head_stride = _strides(first, layout, geometry)
        opaque = layout == "vllm_cpu"
        return cls(
            bases, page_tokens, page_stride, token_stride, head_stride, pages * page_tokens, opaque, tuple(tensors)
        )

    def check_range(self, slots: TokenSlots) -> None:
        """Raises InputError for slots outside the cache."""
        if len(slots) and int(slots.max()) >= self.slots:
            raise InputError(f"slot {int(slots.max())}: the KV cache has slots 0..{self.slots - 1}")

    def check_slots(self, slots: TokenSlots, block_tokens: int) -> None:
        """As `check_range`, and for opaque pages also raises InputError for blocks that are not whole pages."""
        self.check_range(slots)
        if self.opaque and len(slots):
            rows = slots.reshape(-1, block_tokens)
            if (rows != rows[:, :1] + np.arange(block_tokens)).any() or (rows[:, 0] % block_tokens).any():
                raise InputError(
                    f"slot_mapping of opaque pages: each block must be one whole page of {block_tokens} tokens"
                )


def _view(tensor: Any) -> _View:
    if isinstance(tensor, np.ndarray):
        return _View(tensor.ctypes.data, tensor.shape, tensor.strides, tensor.itemsize)
    if getattr(tensor, "device", None) is not None and tensor.device.type == "cpu":
        size = tensor.element_size()
        return _View(tensor.data_ptr(), tuple(tensor.shape), tuple(s * size for s in tensor.stride()), size)
    raise GeometryError(f"KV tensor {type(tensor).__name__} on {getattr(tensor, 'device', '?')}: must be on the CPU")


def _planes(entry: Any, layout: str, geometry: KVGeometry) -> list[_View]:
    """The one or two planes of a layer, each a view without the plane dimension."""
    if layout in ("mla", "vllm_cpu"):
        return [_view(entry)]
    if isinstance(entry, (tuple, list)):
        planes = [_view(part) for part in entry]
    else:
        whole = _view(entry)
        starts = range(whole.shape[0])
        planes = [
            whole._replace(
                address=whole.address + i * whole.strides[0], shape=whole.shape[1:], strides=whole.strides[1:]
            )
            for i in starts
        ]
    if len(planes) != geometry.planes:
        raise GeometryError(f"{len(planes)} planes in a layer: {geometry.planes} expected")
    return planes


def _strides(view: _View, layout: str, geometry: KVGeometry) -> tuple[int, int, int, int, int]:
    """(pages, page_tokens, page_stride, token_stride, head_stride) of one plane."""
    heads, dim, size = geometry.kv_heads, geometry.head_dim, geometry.element_bytes
    rank = 3 if layout == "mla" else 4
    if len(view.shape) != rank:
        raise GeometryError(f"KV tensor of shape {view.shape}: layout {layout!r} has {rank} dimensions a plane")
    if layout == "vllm_cpu":
        pages, page_tokens = view.shape[0], view.shape[2]
        expected: tuple[int, ...] = (heads, geometry.block_tokens, 2 * dim)
        found = view.shape[1:]
        strides = (view.strides[0], geometry.layer_bytes // page_tokens, 0)
        packed = view.strides[1:] == (page_tokens * 2 * dim * size, 2 * dim * size, size)
    elif layout == "mla":
        pages, page_tokens = view.shape[:2]
        expected, found = (dim,), view.shape[2:]
        strides = (view.strides[0], view.strides[1], dim * size)
        packed = view.strides[2] == size
    else:
        token_axis, head_axis = (1, 2) if layout == "nhd" else (2, 1)
        pages, page_tokens = view.shape[0], view.shape[token_axis]
        expected, found = (heads, dim), (view.shape[head_axis], view.shape[3])
        strides = (view.strides[0], view.strides[token_axis], view.strides[head_axis])
        packed = view.strides[3] == size
    if found != expected or not packed:
        raise GeometryError(
            f"KV tensor of shape {view.shape}, strides {view.strides}: expected {expected} packed at its end"
        )
    if layout == "transformers" and pages != 1:
        raise GeometryError(f"batch of {pages}: a Transformers cache must hold one sequence")
    return pages, page_tokens, *strides
