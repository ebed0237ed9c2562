"""Rotary position embedding as whole numbers: the mean of a key channel turns, and every machine turns it alike.

RoPE (Su et al., arXiv 2104.09864) rotates each pair of key channels by an angle that grows with the token's position.
So the mean of a pair over many tokens, which is large before RoPE and tells nothing, becomes a circle after it. A
prediction that runs along the circle takes it out of what must be coded; only how far a pair turns from one token to
the next must be known, not where a block stands. Phases are uint32 parts of a full turn, sines int16 of a table.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from cairn.errors import CairnError, GeometryError

#: Sines are whole numbers of 2 ** -SINE_BITS.
SINE_BITS: Final = 14
_TABLE_BITS: Final = 12
_DIGEST: Final = 0x68C4C0C8DE68056A

Turns = npt.NDArray[np.uint32]


class Rotary(msgspec.Struct, frozen=True):
    """How keys turn. turns: of each pair, parts of 2**32 of a full turn a token; first: the dim where the rotated part
    begins. Pair i is dims (first + i, first + pairs + i), as Llama and its kin in Hugging Face format have it; models
    that rotate neighbouring dims gain nothing and lose nothing but time. Immutable.
    """

    turns: tuple[int, ...]
    first: int = 0

    @classmethod
    def from_frequencies(cls, radians: Any, first: int = 0) -> Self:
        """From angles a token, the model's `inv_freq`."""
        return cls(tuple(round(float(r) / (2 * math.pi) * 2**32) & 0xFFFFFFFF for r in radians), first)

    @classmethod
    def from_theta(cls, theta: float, dim: int, first: int = 0) -> Self:
        """Plain RoPE over `dim` dims from `first` on."""
        return cls.from_frequencies([theta ** (-2 * i / dim) for i in range(dim // 2)], first)

    @classmethod
    def from_hf(cls, config: Any) -> Self | None:
        """Of a Hugging Face config, or None where the rotation is none of the plain kind."""
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, Mapping) or parameters.get("rope_type", "default") != "default":
            return None
        heads = int(config.num_attention_heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        part = int(dim * float(parameters.get("partial_rotary_factor", 1.0)))
        return cls.from_theta(float(parameters["rope_theta"]), part)

    def check(self, head_dim: int) -> None:
        """Raises GeometryError unless the pairs fit a head."""
        if self.first < 0 or self.first + 2 * len(self.turns) > head_dim:
            raise GeometryError(
                f"rotary of {len(self.turns)} pairs from dim {self.first}: does not fit head_dim={head_dim}"
            )


def sines(turns: Turns, tokens: int) -> npt.NDArray[np.int16]:
    """int16 [2, tokens, pairs]: cosine and sine of each pair at each token, the first at angle 0."""
    phase = np.arange(tokens, dtype=np.uint32)[:, np.newaxis] * turns
    place = phase >> np.uint32(32 - _TABLE_BITS)
    sine = _sine()
    quarter = np.uint32(1 << _TABLE_BITS - 2)
    return np.stack([sine[(place + quarter) & np.uint32((1 << _TABLE_BITS) - 1)], sine[place]])


@cache
def _sine() -> npt.NDArray[np.int16]:
    size = 1 << _TABLE_BITS
    table = np.array([round(math.sin(2 * math.pi * i / size) * 2**SINE_BITS) for i in range(size)], np.int16)
    digest = xxhash.xxh3_64_intdigest(table.astype("<i2").tobytes())
    if digest != _DIGEST:
        raise CairnError(f"table of sines has digest {digest:#x}, not {_DIGEST:#x}: set compression.algorithm to none")
    return table
