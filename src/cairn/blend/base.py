"""The contracts of blending: what a model must be able to do, and where a prompt's KV is put together.

Blending (CacheBlend: Yao et al., EuroSys'25, arXiv 2405.16444) reuses the KV of a chunk of text wherever the chunk
stands in a prompt. Its keys are turned to the new positions, which is exact; what other chunks would have changed about
it is not in it, and is made good by computing those tokens anew whose KV differs most. What comes out is close to what
the whole prompt would have given, and not equal to it: it belongs to this prompt alone and must never be stored or
shared under the keys of a prefix.
"""

import hashlib
import struct
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cairn.errors import CairnError

#: K and V of one layer as torch tensors [tokens, kv_heads, head_dim], token i of the prompt in row i, any strides.
Planes = tuple[Any, Any]
#: What a layer makes of some tokens: q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim].
Projected = tuple[Any, Any, Any]


class BlendError(CairnError):
    """A chunk that blending had begun with did not come: compute the prompt behind its plain prefix instead."""


class Rope(NamedTuple):
    """How a model encodes positions (RoPE, arXiv 2104.09864): linear, NTK, YaRN, Llama 3, whatever made them.

    frequencies: float32 [pairs], radians a token of each pair of dims. scaling: what cosines and sines are multiplied
    by (YaRN). interleaved: pair i is dims 2i and 2i+1 (GPT-J); else i and pairs+i (GPT-NeoX). Dims behind the pairs
    are not turned. Immutable.
    """

    frequencies: npt.NDArray[np.float32]
    scaling: float = 1.0
    interleaved: bool = False

    def digest(self) -> bytes:
        """16 bytes; equal only where keys turn alike, bit for bit."""
        data = np.ascontiguousarray(self.frequencies, "<f4").tobytes() + struct.pack(
            "<d?", self.scaling, self.interleaved
        )
        return hashlib.blake2s(data, digest_size=16, person=b"cairn/rp").digest()


class Piece(NamedTuple):
    """Tokens start..stop of a prompt, between two separators."""

    start: int
    stop: int


class BlendModel(Protocol):
    """A loaded model, layer by layer, for one sequence. Tensors have one row a token and stay on the model's device.

    Owned by one thread at a time.
    """

    layers: int
    rope: Rope

    def embed(self, tokens: Any) -> Any:
        """Token ids int64 [rows] -> what layer 0 is given, [rows, width]."""

    def project(self, layer: int, hidden: Any, positions: Any) -> Projected:
        """The layer's q, k, v of rows at `positions` (int64 [rows]): normed, projected and turned as the model does."""

    def attend(self, layer: int, queries: Any, planes: Planes, positions: Any) -> Any:
        """Each row at positions[i] over tokens 0..positions[i] of the layer's planes -> [rows, heads, dim].

        Positions ascend. `cairn.blend.attention.attend` does it for plain attention on any device of torch.
        """

    def advance(self, layer: int, hidden: Any, attended: Any) -> Any:
        """Output projection, residuals and MLP: what the next layer is given, [rows, width]."""


class Canvas(Protocol):
    """Where the KV of one prompt is put together, layer by layer from the first to the last."""

    def load(self, layer: int) -> Planes:
        """The layer's planes, once everything that is reused is in them, its keys turned to their new positions.

        Written to by the caller until `finish`. Raises BlendError when it did not come in time.
        """

    def finish(self, layer: int) -> None:
        """The layer is complete and will not be written to any more."""
