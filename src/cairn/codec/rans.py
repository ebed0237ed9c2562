"""Entropy coding by interleaved rANS: 32 lanes, each with a state of its own, one run of 16-bit words for all.

A stream holds residuals of some groups of 32 channels; lane i has channel i of each group, one group after the other,
all tokens of a group in order. Lanes that need a word take it in lane order. So a GPU decodes a lane a thread: which
word is its own it learns from a ballot, and reads and writes stay coalesced; a CPU takes lane after lane and hides the
latency of one behind the others. rANS: Jarek Duda, arXiv 1311.2540; interleaving: Fabian Giesen, arXiv 1402.3392.

A state is at least 2**16 between symbols. A symbol takes or gives SLOT_BITS and its channel's low bits, 16 at most, so
that one word always refills a state. Encoding runs backwards from states of 2**16; a decoder ends there again with all
words used, or the stream is not what an encoder made.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.codec.tables import HALF, MOST_LOW_BITS, SLOT_BITS, SLOTS, SYMBOLS, WIDTHS
from cairn.jit import kernel

LANES: Final = 32
START: Final = 1 << 16

#: Residuals of one plane, int16 [tokens, channels].
Residuals = npt.NDArray[np.int16]


@kernel
def encode_stream(
    residuals: Residuals,
    first: int,
    groups: int,
    classes: npt.NDArray[np.uint8],
    encoder: npt.NDArray[np.uint32],
    words: npt.NDArray[np.uint16],
    states: npt.NDArray[np.uint32],
) -> int:
    """Codes `groups` groups from group `first` on; returns how many words it took.

    residuals: each within its class's range. words: written from the front, at least tokens * 32 * groups; states:
    uint32 [32], the decoder's first ones.
    """
    tokens, channels = residuals.shape
    count = 0
    for lane in range(LANES):
        states[lane] = np.uint32(START)
    for group in range(first + groups - 1, first - 1, -1):
        lanes = min(LANES, channels - group * LANES)
        for t in range(tokens - 1, -1, -1):
            for lane in range(lanes - 1, -1, -1):
                channel = group * LANES + lane
                low = np.uint32(classes[channel] >> 4)
                residual = np.int32(residuals[t, channel])
                symbol = (residual >> np.int32(low)) + HALF
                entry = encoder[(classes[channel] & (WIDTHS - 1)) * SYMBOLS + symbol]
                freq, start = np.uint64(entry & np.uint32(0xFFFF)), np.uint64(entry >> np.uint32(16))
                x = np.uint64(states[lane])
                if x >= freq << np.uint64(32 - SLOT_BITS - low):
                    words[count] = np.uint16(x & np.uint64(0xFFFF))
                    count += 1
                    x >>= np.uint64(16)
                x = (x // freq << np.uint64(SLOT_BITS)) + x % freq + start
                rest = np.uint64(residual) & np.uint64((1 << low) - 1)
                states[lane] = np.uint32(x << np.uint64(low) | rest)
    for i in range(count // 2):  # the decoder takes first what was written last
        words[i], words[count - 1 - i] = words[count - 1 - i], words[i]
    return count


@kernel
def decode_stream(
    words: npt.NDArray[np.uint16],
    begin: int,
    end: int,
    states: npt.NDArray[np.uint32],
    first: int,
    groups: int,
    classes: npt.NDArray[np.uint8],
    decoder: npt.NDArray[np.uint32],
    residuals: Residuals,
) -> bool:
    """Fills `groups` groups of residuals [tokens, channels] from words[begin:end]; False if these are no such stream.

    states: uint32 [32], changed. classes: checked by the caller. Reads no word outside begin ... end - 1.
    """
    tokens, channels = residuals.shape
    at = np.int64(begin)
    bases = np.empty(LANES, np.uint32)
    lows = np.empty(LANES, np.uint32)
    for group in range(first, first + groups):
        lanes = min(LANES, channels - group * LANES)
        for lane in range(lanes):
            klass = classes[group * LANES + lane]
            bases[lane] = np.uint32(klass & (WIDTHS - 1)) * np.uint32(SLOTS)
            lows[lane] = np.uint32(klass >> 4)
        for t in range(tokens):
            out = residuals[t, group * LANES : group * LANES + lanes]
            careful = at + LANES > end
            for lane in range(lanes):
                x = states[lane]
                low = lows[lane]
                rest = x & ((np.uint32(1) << low) - np.uint32(1))
                x >>= low
                entry = decoder[bases[lane] + (x & np.uint32(SLOTS - 1))]
                x = ((entry >> np.uint32(11)) & np.uint32(2047)) * (x >> np.uint32(SLOT_BITS)) + (
                    entry & np.uint32(2047)
                )
                out[lane] = np.int16(
                    ((np.int32(entry >> np.uint32(22)) - np.int32(HALF)) << np.int32(low)) | np.int32(rest)
                )
                if careful:
                    if x < np.uint32(START):
                        if at >= end:
                            return False
                        x = x << np.uint32(16) | np.uint32(words[at])
                        at += np.int64(1)
                else:  # without a branch, which nobody could foretell
                    short = np.uint32(x < np.uint32(START))
                    x = x << (short << np.uint32(4)) | (np.uint32(words[at]) & (np.uint32(0) - short))
                    at += np.int64(short)
                states[lane] = x
    good = at == end
    for lane in range(LANES):
        good = good and states[lane] == np.uint32(START)
    return bool(good)


@kernel
def classes_are_sound(classes: npt.NDArray[np.uint8]) -> bool:
    """Whether every class names a table and at most MOST_LOW_BITS."""
    for klass in classes:  # noqa: SIM110
        if klass >> 4 > MOST_LOW_BITS:
            return False
    return True
