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

LAYOUTS = ("nhd", "nhd_paged", "cross_layer", "hnd", "transformers", "mla", "vllm")


class _View(NamedTuple):
    """One tensor: where it starts, its shape, its strides in bytes, its device (-1: CPU), and what its elements are
    called, if they are floats; integers may stand for any.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element_bytes: int
    device: int
    floats: str

    def select(self, axis: int, index: int) -> "_View":
        """The view at `index` of a dimension, without that dimension."""
        rest = [i for i in range(len(self.shape)) if i != axis]
        return self._replace(
            address=self.address + index * self.strides[axis],
            shape=tuple(self.shape[i] for i in rest),
            strides=tuple(self.strides[i] for i in rest),
        )


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One engine's KV cache: where token t of (layer, plane, head) stands.

    bases: int64 [layers, planes], the address of page 0; a token in slot s stands at
    base + s // page_tokens * page_stride + s % page_tokens * token_stride + head * head_stride, head_dim elements in a
    row. Strides in bytes. slots: how many tokens it has room for. opaque: pages are moved whole, their inside is the
    engine's. device: index of the CUDA device that holds it, -1 for the CPU.

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
    device: int = -1

    @classmethod
    def from_tensors(cls, tensors: Sequence[Any], layout: str, geometry: KVGeometry) -> "PagedKV":
        """`tensors`: one entry a layer, torch (CPU or CUDA) or numpy, by `layout`:

        nhd           [2, pages, page_tokens, heads, dim], or a pair (K, V) of [pages, page_tokens, heads, dim]
        nhd_paged     [pages, 2, page_tokens, heads, dim]
        cross_layer   one tensor for all layers, [pages, layers, 2, page_tokens, heads, dim]: a page is one run
        hnd           [2, pages, heads, page_tokens, dim], or a pair (K, V) of [pages, heads, page_tokens, dim]
        transformers  a pair (K, V) of [1, heads, tokens, dim]
        mla           [pages, page_tokens, dim], the latent and the RoPE part in one
        vllm          [pages, heads, page_tokens, 2 * dim] in either order of heads and tokens, moved as opaque pages of
                      `geometry.block_tokens`

        Raises GeometryError if shapes, dtypes or strides do not fit `geometry` or differ between layers.
        """
        if layout not in LAYOUTS:
            raise GeometryError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
        views = _layers(tensors, layout, geometry)
        first = views[0][0]
        for layer, planes in enumerate(views):
            for view in planes:
                if view.device != first.device:
                    raise GeometryError(f"layer {layer}: on device {view.device}, layer 0 on {first.device}")
                if view.shape != first.shape or view.strides != first.strides:
                    raise GeometryError(
                        f"layer {layer}: shape {view.shape}, strides {view.strides} differ from layer 0's"
                    )
                if view.element_bytes != geometry.element_bytes:
                    raise GeometryError(f"layer {layer}: {view.element_bytes}-byte elements: {geometry.dtype} expected")
                if {view.floats, geometry.dtype} == {"float16", "bfloat16"}:
                    # They would pass for each other until somebody else reads what was stored. (What engines call
                    # floats of 8 bits differs from machine to machine.)
                    raise GeometryError(f"layer {layer}: {view.floats} elements: {geometry.dtype} expected")
        bases = np.array([[view.address for view in planes] for planes in views], np.int64)
        pages, page_tokens, page_stride, token_stride, head_stride = _strides(first, layout, geometry)
        opaque = layout == "vllm"
        return cls(
            bases=bases,
            page_tokens=page_tokens,
            page_stride=page_stride,
            token_stride=token_stride,
            head_stride=head_stride,
            slots=pages * page_tokens,
            opaque=opaque,
            owner=tuple(tensors),
            device=first.device,
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
        floats = tensor.dtype.name if tensor.dtype.kind == "f" else ""
        return _View(tensor.ctypes.data, tensor.shape, tensor.strides, tensor.itemsize, -1, floats)
    device = getattr(tensor, "device", None)
    if device is not None and device.type in ("cpu", "cuda"):
        size = tensor.element_size()
        strides = tuple(step * size for step in tensor.stride())
        floats = str(tensor.dtype).removeprefix("torch.") if tensor.dtype.is_floating_point else ""
        index = -1 if device.type == "cpu" else device.index
        return _View(tensor.data_ptr(), tuple(tensor.shape), strides, size, index, floats)
    raise GeometryError(f"KV tensor {type(tensor).__name__} on {device or '?'}: must be on the CPU or a CUDA device")


def _layers(tensors: Sequence[Any], layout: str, geometry: KVGeometry) -> list[list[_View]]:
    """The planes of every layer."""
    if layout == "cross_layer":
        if len(tensors) != 1:
            raise GeometryError(f"{len(tensors)} KV tensors: layout 'cross_layer' is one tensor for all layers")
        whole = _view(tensors[0])
        if len(whole.shape) != 6 or whole.shape[1] != geometry.layers:
            raise GeometryError(f"KV tensor of shape {whole.shape}: [pages, {geometry.layers}, 2, ...] expected")
        return [_split(whole.select(1, layer), 1, geometry) for layer in range(geometry.layers)]
    if len(tensors) != geometry.layers:
        raise GeometryError(f"{len(tensors)} layers of KV tensors: the geometry has {geometry.layers}")
    return [_planes(entry, layout, geometry) for entry in tensors]


def _planes(entry: Any, layout: str, geometry: KVGeometry) -> list[_View]:
    """The one or two planes of a layer, each a view without the plane dimension."""
    if layout in ("mla", "vllm"):
        return [_view(entry)]
    if isinstance(entry, (tuple, list)):
        planes = [_view(part) for part in entry]
        if len(planes) != geometry.planes:
            raise GeometryError(f"{len(planes)} planes in a layer: {geometry.planes} expected")
        return planes
    return _split(_view(entry), 1 if layout == "nhd_paged" else 0, geometry)


def _split(whole: _View, axis: int, geometry: KVGeometry) -> list[_View]:
    """The planes that stand along `axis`."""
    if len(whole.shape) <= axis or whole.shape[axis] != geometry.planes:
        planes = whole.shape[axis] if len(whole.shape) > axis else 0
        raise GeometryError(f"{planes} planes in a layer: {geometry.planes} expected")
    return [whole.select(axis, plane) for plane in range(geometry.planes)]


def _strides(view: _View, layout: str, geometry: KVGeometry) -> tuple[int, int, int, int, int]:
    """(pages, page_tokens, page_stride, token_stride, head_stride) of one plane."""
    heads, dim, size = geometry.kv_heads, geometry.head_dim, geometry.element_bytes
    rank = 3 if layout == "mla" else 4
    if len(view.shape) != rank:
        raise GeometryError(f"KV tensor of shape {view.shape}: layout {layout!r} has {rank} dimensions a plane")
    if layout == "vllm":
        pages, page_tokens = view.shape[0], view.shape[2]
        expected: tuple[int, ...] = (heads, geometry.block_tokens, 2 * dim)
        found = view.shape[1:]
        strides = (view.strides[0], geometry.layer_bytes // page_tokens, 0)
        vector = 2 * dim * size
        packed = view.strides[1:] in ((page_tokens * vector, vector, size), (vector, heads * vector, size))
    elif layout == "mla":
        pages, page_tokens = view.shape[:2]
        expected, found = (dim,), view.shape[2:]
        strides = (view.strides[0], view.strides[1], dim * size)
        packed = view.strides[2] == size
    else:
        token_axis, head_axis = (2, 1) if layout in ("hnd", "transformers") else (1, 2)
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
