"""What `cachegen` makes of one plane (K or V of one layer): steps, anchors, classes and residuals; and back.

value = (residual + prediction) * step. There is one step a head: with entropy coding behind it, equal noise in all of a
head's channels costs the fewest bits (reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3).
The prediction is the channel's anchor, its mean in steps, which for rotated keys runs along a circle (`rotary`). All of
it is whole numbers up to the one product, so that every machine decodes the same bits.

A vector (one token in one head) is kept exact when it is asked for, when it is not finite, or when a residual is out of
its class's range; its residuals are coded as zeros. Sums are float64, added in the order that is written here, and all
is defined for any values, so that an encoder elsewhere makes the same bytes (`encoder_cuda`).
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.codec.floats import BFLOAT16, FLOAT32, Bits, narrow, widen
from cairn.codec.rans import Residuals
from cairn.codec.rotary import SINE_BITS
from cairn.codec.tables import HALF
from cairn.jit import kernel

#: step = 2 ** ((code - STEP_ZERO) / STEPS_AN_OCTAVE), code a byte.
STEPS_AN_OCTAVE: Final = 8
STEP_ZERO: Final = 160
STEPS: Final = np.array([2.0 ** ((i - STEP_ZERO) / STEPS_AN_OCTAVE) for i in range(256)], np.float32)
#: Steps above which the next code is the nearest, float64.
STEP_EDGES: Final = np.array([2.0 ** ((i + 0.5 - STEP_ZERO) / STEPS_AN_OCTAVE) for i in range(255)])
LEAST_STEP: Final = 1e-6

#: Quotients beyond it are out of range whatever the prediction.
FAR: Final = np.float32(1 << 20)
MOST_ANCHOR: Final = 32767
#: Values from it on are out of range whatever the step. Without them all sums are finite, and what comes back, which is
#: off by half a step, is a number in float16, too.
LARGEST: Final = np.float32(1 << 14)
_ROUND: Final = 1 << SINE_BITS - 1

Floats = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]
#: int16 [2, tokens, pairs]: see `rotary.sines`.
Sines = npt.NDArray[np.int16]


@kernel
def load_plane(rows: Bits, offset: int, block_tokens: int, kind: int, values: Floats) -> None:
    """values [tokens, channels] of the plane that begins at element `offset` of every row."""
    tokens, channels = values.shape
    for t in range(tokens):
        at = offset + t % block_tokens * channels
        source, target = rows[t // block_tokens, at : at + channels], values[t]
        for c in range(channels):
            target[c] = widen(source[c], kind)


@kernel
def fit_plane(
    values: Floats,
    relative_step: float,
    sines: Sines,
    first: int,
    edges: Floats,
    all_classes: Octets,
    exact: Octets,
    codes: Octets,
    anchors: npt.NDArray[np.int16],
    classes: Octets,
    residuals: Residuals,
) -> int:
    """Chooses a plane's parameters and computes its residuals; returns how many vectors are exact.

    values: [tokens, heads * dim]. relative_step: of a head's deviation from its anchors. exact: uint8 [tokens, heads],
    1 where the caller wants it; more are set. codes: [heads]; anchors, classes: [channels]; residuals: as values.
    """
    tokens, channels = values.shape
    heads = len(codes)
    dim = channels // heads
    pairs = sines.shape[2]
    scale = np.float32(1.0 / (1 << SINE_BITS))
    counts = np.zeros(heads, np.int64)
    sums, squares = np.zeros(channels, np.float64), np.zeros(channels, np.float64)
    for t in range(tokens):
        for h in range(heads):
            vector = values[t, h * dim : (h + 1) * dim]
            if not exact[t, h] and not _is_codable(vector):
                exact[t, h] = 1
            if exact[t, h]:
                continue
            counts[h] += 1
            for d in range(dim):
                sums[h * dim + d] += vector[d]
                squares[h * dim + d] += vector[d] * vector[d]
            for i in range(pairs):
                cosine, sine = sines[0, t, i] * scale, sines[1, t, i] * scale
                x, y = vector[first + i], vector[first + pairs + i]
                sums[h * dim + first + i] += x * cosine + y * sine - x
                sums[h * dim + first + pairs + i] += y * cosine - x * sine - y
    for h in range(heads):
        count = max(counts[h], 1)
        variance, largest = 0.0, 0.0
        for c in range(h * dim, (h + 1) * dim):
            sums[c] /= count
            largest = max(largest, abs(sums[c]))
            variance += max(squares[c] / count - sums[c] * sums[c], 0.0)
        # Pairs are taken together: a rotation keeps the sum of their squares, not each.
        for i in range(pairs):
            a, b = h * dim + first + i, h * dim + first + pairs + i
            apart = max(squares[a] / count - sums[a] ** 2, 0.0) + max(squares[b] / count - sums[b] ** 2, 0.0)
            together = max((squares[a] + squares[b]) / count - sums[a] ** 2 - sums[b] ** 2, 0.0)
            variance += together - apart
        step = max(relative_step * math.sqrt(max(variance, 0.0) / dim), largest / MOST_ANCHOR, LEAST_STEP)
        codes[h] = np.searchsorted(STEP_EDGES, step)
        for c in range(h * dim, (h + 1) * dim):
            anchors[c] = min(max(round(sums[c] / STEPS[codes[h]]), -MOST_ANCHOR), MOST_ANCHOR)
    return _residuals(values, sines, first, edges, all_classes, exact, codes, anchors, classes, residuals)


@kernel
def _is_codable(vector: Floats) -> bool:
    for value in vector:  # noqa: SIM110
        if not abs(value) < LARGEST:
            return False
    return True


@kernel
def _residuals(
    values: Floats,
    sines: Sines,
    first: int,
    edges: Floats,
    all_classes: Octets,
    exact: Octets,
    codes: Octets,
    anchors: npt.NDArray[np.int16],
    classes: Octets,
    residuals: Residuals,
) -> int:
    tokens, channels = values.shape
    heads = len(codes)
    dim = channels // heads
    predicted = np.empty(channels, np.int32)
    power, counts = np.zeros(channels, np.float64), np.zeros(heads, np.int64)
    for t in range(tokens):
        predict(anchors, sines, first, t, heads, predicted)
        for h in range(heads):
            if exact[t, h]:
                continue
            inverse = np.float32(1.0) / STEPS[codes[h]]
            fits = True
            for c in range(h * dim, (h + 1) * dim):
                quotient = np.rint(values[t, c] * inverse)
                fits = fits and abs(quotient) < FAR
                residual = np.int32(min(max(quotient, -FAR), FAR)) - predicted[c]
                fits = fits and abs(residual) <= MOST_ANCHOR
                residuals[t, c] = np.int16(min(max(residual, -MOST_ANCHOR), MOST_ANCHOR))
            if not fits:
                exact[t, h] = 1
                continue
            counts[h] += 1
            for c in range(h * dim, (h + 1) * dim):
                power[c] += np.float64(residuals[t, c]) ** 2
    for c in range(channels):
        deviation = math.sqrt(power[c] / max(counts[c // dim], 1))
        place = 0
        while place < len(edges) and edges[place] < deviation:
            place += 1
        classes[c] = all_classes[place]
    found = 0
    for t in range(tokens):
        for h in range(heads):
            for c in range(h * dim, (h + 1) * dim):
                high = residuals[t, c] >> (classes[c] >> 4)
                if high < -HALF or high >= HALF:
                    exact[t, h] = 1
            if exact[t, h]:
                found += 1
                residuals[t, h * dim : (h + 1) * dim] = 0
    return found


@kernel
def predict(
    anchors: npt.NDArray[np.int16], sines: Sines, first: int, t: int, heads: int, predicted: npt.NDArray[np.int32]
) -> None:
    """What is expected of token t, int32 [channels], in steps."""
    for c in range(len(anchors)):
        predicted[c] = anchors[c]
    pairs = sines.shape[2]
    dim = len(anchors) // heads
    cosines, sine = sines[0, t], sines[1, t]
    for h in range(heads):
        at = h * dim + first
        left, right = anchors[at : at + pairs], anchors[at + pairs : at + 2 * pairs]
        ahead, behind = predicted[at : at + pairs], predicted[at + pairs : at + 2 * pairs]
        for i in range(pairs):
            a, b = np.int32(left[i]), np.int32(right[i])
            cos, sin = np.int32(cosines[i]), np.int32(sine[i])
            ahead[i] = (a * cos - b * sin + np.int32(_ROUND)) >> np.int32(SINE_BITS)
            behind[i] = (a * sin + b * cos + np.int32(_ROUND)) >> np.int32(SINE_BITS)


@kernel
def restore_plane(
    residuals: Residuals,
    codes: Octets,
    anchors: npt.NDArray[np.int16],
    sines: Sines,
    first: int,
    rows: Bits,
    offset: int,
    block_tokens: int,
    kind: int,
) -> None:
    """Writes the values of a plane into its place in every row."""
    tokens, channels = residuals.shape
    heads = len(codes)
    dim = channels // heads
    predicted, steps = np.empty(channels, np.int32), np.empty(channels, np.float32)
    values = np.empty(channels, np.float32)
    bits = values.view(np.uint32)
    for c in range(channels):
        steps[c] = STEPS[codes[c // dim]]
    turns = sines.shape[2] > 0
    predict(anchors, sines, first, 0, heads, predicted)
    for t in range(tokens):
        if turns:
            predict(anchors, sines, first, t, heads, predicted)
        at = offset + t % block_tokens * channels
        target, source = rows[t // block_tokens, at : at + channels], residuals[t]
        for c in range(channels):
            values[c] = np.float32(np.int32(source[c]) + predicted[c]) * steps[c]
        # Values are finite. Rounding whole rows of bits, the compiler uses vectors.
        if kind == BFLOAT16:
            for c in range(channels):
                b = bits[c]
                target[c] = (b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        elif kind == FLOAT32:
            for c in range(channels):
                target[c] = bits[c]
        else:
            for c in range(channels):
                target[c] = narrow(values[c], kind)
