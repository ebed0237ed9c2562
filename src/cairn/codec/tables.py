"""Frequencies that every writer and reader shares: discretized logistic distributions of 16 widths.

A channel names one in a byte and sends no table of its own. A residual r is split into a symbol r >> k, which these
frequencies code, and k low bits, which are as good as uniform where k > 0; so wide channels use the widest four tables.
The logistic distribution lies between Gauss and Laplace, fits both K and V, and has a closed form.
"""

import math
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from cairn.errors import CairnError

SLOT_BITS: Final = 10
SLOTS: Final = 1 << SLOT_BITS
#: Symbols stand for -HALF ... HALF - 1.
SYMBOLS: Final = 32
HALF: Final = 16
WIDTHS: Final = 16
#: Low bits that go with a symbol: a decoded symbol takes at most 16 bits from its lane.
MOST_LOW_BITS: Final = 6

#: Standard deviations of the tables, in steps: a quarter of an octave apart.
SIGMAS: Final = tuple(0.2 * 2 ** (i / 4) for i in range(WIDTHS))

_DIGEST: Final = 0x73D588D8E372C90D


class Tables(NamedTuple):
    """encoder: uint32 [WIDTHS * SYMBOLS], start << 16 | frequency. decoder: uint32 [WIDTHS * SLOTS], symbol << 22 |
    frequency << 11 | slot - start. Read-only, shared by all."""

    encoder: npt.NDArray[np.uint32]
    decoder: npt.NDArray[np.uint32]


def expand(frequencies: npt.NDArray[np.int64]) -> Tables:
    """The tables for frequencies int64 [n, SYMBOLS], whose rows sum to SLOTS."""
    starts = np.cumsum(frequencies, axis=1) - frequencies
    encoder = (starts << 16 | frequencies).astype(np.uint32).reshape(-1)
    decoder = np.empty((len(frequencies), SLOTS), np.uint32)
    for row, (freq, start) in enumerate(zip(frequencies, starts, strict=True)):
        symbol = np.repeat(np.arange(SYMBOLS), freq)
        decoder[row] = symbol << 22 | freq[symbol] << 11 | np.arange(SLOTS) - start[symbol]
    return Tables(encoder, decoder.reshape(-1))


@cache
def shared_tables() -> Tables:
    """The tables. Raises CairnError on a machine whose arithmetic makes others than everybody else's."""
    frequencies = np.stack([_logistic(sigma) for sigma in SIGMAS])
    digest = xxhash.xxh3_64_intdigest(frequencies.astype("<u2").tobytes())
    if digest != _DIGEST:
        raise CairnError(
            f"frequency tables have digest {digest:#x}, not {_DIGEST:#x}: set compression.algorithm to none"
        )
    return expand(frequencies)


def _logistic(sigma: float) -> npt.NDArray[np.int64]:
    """Frequencies of round(x), x logistic with deviation `sigma`; the tails belong to the last symbols."""
    scale = sigma * math.sqrt(3) / math.pi
    edges = [
        1 / (1 + math.exp(-(i + 0.5) / scale)) if (i + 0.5) / scale > -700 else 0.0 for i in range(-HALF, HALF - 1)
    ]
    bounds = [0.0, *edges, 1.0]
    room = SLOTS - SYMBOLS
    frequencies = np.array([1 + int(room * (b - a)) for a, b in pairwise(bounds)], np.int64)
    frequencies[HALF] += SLOTS - frequencies.sum()
    return frequencies


@cache
def class_edges() -> npt.NDArray[np.float32]:
    """Deviations in steps at which the next class is the better one, float32; class = 16 k + width, in this order."""
    sigmas = list(SIGMAS) + [s * 2**k for k in range(1, MOST_LOW_BITS + 1) for s in SIGMAS[-4:]]
    return np.array([math.sqrt(a * b) for a, b in pairwise(sigmas)], np.float32)


@cache
def classes() -> npt.NDArray[np.uint8]:
    """The class bytes, narrowest first, uint8."""
    wide = [16 * k + w for k in range(1, MOST_LOW_BITS + 1) for w in range(WIDTHS - 4, WIDTHS)]
    return np.array([*range(WIDTHS), *wide], np.uint8)
