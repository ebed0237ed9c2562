"""How an engine's row holds a block: which part of the model stands where, and in what order. Values only.

What several engines share has one order, the canonical `[layer, k|v, token, head, dim]` of the whole model. An engine's
rows may have another: the ranks' parts one behind the other, and inside of a layer whatever its attention reads best.
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.errors import GeometryError
from cairn.kv.geometry import KVGeometry

#: A block or a row, uint8 [geometry.block_bytes], contiguous.
Block = npt.NDArray[np.uint8]

#: What a layer of a part looks like. canonical: [k|v, token, head, dim]. vllm_cpu: by head, K as [dim, token], then V
#: as [token, dim].
Page = Literal["canonical", "vllm_cpu"]

_WORDS: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one rank holds: `layers` from `first_layer` on, of each `heads` KV heads from `first_head` on."""

    first_layer: int
    layers: int
    first_head: int
    heads: int


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """parts: in the order in which they stand in a row; empty: one, which is all of the model. page: of each layer of
    each part. Thread-safe (immutable).
    """

    page: Page = "canonical"
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=4096)] = ()

    @classmethod
    def of(cls, page: Page, parts: tuple[Part, ...], geometry: KVGeometry) -> Self:
        """The simplest layout that says the same. Raises as `check`."""
        layout = cls(page, parts)
        layout.check(geometry)
        in_order = all(part.heads == geometry.kv_heads for part in parts)
        in_order &= [part.first_layer for part in parts] == sorted(part.first_layer for part in parts)
        return cls(page) if in_order else layout

    def check(self, geometry: KVGeometry) -> None:
        """Raises GeometryError unless every head of every layer stands in exactly one part."""
        held = np.zeros((geometry.layers, geometry.kv_heads), np.int64)
        for part in self.parts:
            if not (
                0 <= part.first_layer < part.first_layer + part.layers <= geometry.layers
                and 0 <= part.first_head < part.first_head + part.heads <= geometry.kv_heads
            ):
                raise GeometryError(f"{part}: must lie within {geometry.layers} layers of {geometry.kv_heads} KV heads")
            held[_slices(part)] += 1
        if self.parts and (held != 1).any():
            layer, head = np.argwhere(held != 1)[0].tolist()
            raise GeometryError(f"head {head} of layer {layer} stands in {held[layer, head]} parts: must be one")
        if self.page == "vllm_cpu" and geometry.planes != 2:
            raise GeometryError(f"page='vllm_cpu' with {geometry.planes} plane: must have K and V")

    def digest(self) -> bytes:
        """What tells this layout from others: 8 bytes; none for the canonical one."""
        return b"" if self == CANONICAL else hashlib.blake2s(msgspec.msgpack.encode(self), digest_size=8).digest()

    def to_canonical(self, row: Block, block: Block, geometry: KVGeometry) -> None:
        """Fills `block` with the canonical bytes of `row`. The two must not overlap. Frees the GIL while it copies."""
        for canonical, own in self._pairs(row, block, geometry):
            np.copyto(canonical, own)

    def from_canonical(self, block: Block, row: Block, geometry: KVGeometry) -> None:
        """The reverse."""
        for canonical, own in self._pairs(row, block, geometry):
            np.copyto(own, canonical)

    def _pairs(self, row: Block, block: Block, geometry: KVGeometry) -> Iterator["_Pair"]:
        """The same values in both, as arrays of one shape [layers, planes, token, head, dim]."""
        word = _WORDS[geometry.element_bytes]
        whole, rest = block.view(word).reshape(geometry.block_shape), row.view(word)
        for part in self.parts or (Part(0, geometry.layers, 0, geometry.kv_heads),):
            layers, heads = _slices(part)
            values = whole[layers, :, :, heads]
            own, rest = rest[: values.size], rest[values.size :]
            if self.page == "canonical":
                yield _Pair(values, own.reshape(values.shape))
                continue
            count, planes, tokens, kv_heads, dim = values.shape
            pages = own.reshape(count, kv_heads, planes, tokens * dim)
            keys = pages[:, :, 0].reshape(count, kv_heads, dim, tokens)
            yield _Pair(values[:, 0], keys.transpose(0, 3, 1, 2))
            yield _Pair(values[:, 1], pages[:, :, 1].reshape(count, kv_heads, tokens, dim).transpose(0, 2, 1, 3))


class _Pair(NamedTuple):
    canonical: npt.NDArray[Any]
    own: npt.NDArray[Any]


def _slices(part: Part) -> tuple[slice, slice]:
    return (
        slice(part.first_layer, part.first_layer + part.layers),
        slice(part.first_head, part.first_head + part.heads),
    )


CANONICAL: Final = Layout()
