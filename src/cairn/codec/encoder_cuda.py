"""Encodes all planes of a `cachegen` stream on one device: byte for byte what `sections.encode_planes` makes of them.

What a plane's parameters and residuals are is said in `planes`; here it is done for all planes at once, by torch where
that is a pass or two or few numbers, else by the kernels of `triton_planes`. The host waits twice: for the stream's
length and for the stream, which comes into pinned memory of torch's.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import torch
import triton

from cairn.codec import sections, tables, triton_kernels, triton_planes
from cairn.codec.cachegen import Plain
from cairn.codec.lane_cuda import DTYPES, Lane
from cairn.codec.parts import Octets, Shape, streams_of
from cairn.codec.planes import FAR, LARGEST, LEAST_STEP, MOST_ANCHOR, STEP_EDGES, STEPS
from cairn.codec.rans import LANES

#: Of a program: channels, rows of a sum, values, words of a copy at a time; and how many copy a plane.
_CHANNELS, _ROWS, _TILE, _WORDS, _COPIERS = 128, 32, 2048, 512, 32
#: Tokens that a loop takes at a time, so that many loads are under way.
_UNROLL: Final = 8


class _Values(NamedTuple):
    """All planes' values [planes, tokens, channels], bfloat16 as uint16; exact: uint8 [planes, tokens, heads], of which
    more are set as it goes; turns: of `Lane`; numbers: what kernels take besides, by name.
    """

    bits: Any
    exact: Any
    turns: Any
    numbers: dict[str, int]


class Encoder(Lane):
    """Memory is torch's, which keeps it for the next stream: about five times the values."""

    def __init__(self, device: str) -> None:
        """Raises RuntimeError where there is no such device."""
        super().__init__(device)
        numbers = tables.shared_tables().encoder, tables.classes(), STEPS, np.float32(1) / STEPS, STEP_EDGES
        with self.enqueueing():
            self._encoder, self._classes, self._steps, self._inverses, self._step_edges = map(self.put, numbers)
            self._class_edges = self.put(tables.class_edges()).double()

    def encode(self, plain: Plain, shape: Shape, dtype: str) -> Octets | None:
        """A stream, all but its header's first words and turns; None if it gets no smaller. Raises RuntimeError where
        the device fails.
        """
        with self.enqueueing():
            return self._encode(plain, shape, dtype)

    def _encode(self, plain: Plain, shape: Shape, dtype: str) -> Octets | None:
        layers, planes, block_tokens, heads, dim = shape
        count, channels, tokens = layers * planes, heads * dim, len(plain.rows) * block_tokens
        blocks = self.put(plain.rows).view(DTYPES[dtype])[:, : count * block_tokens * channels]
        values = blocks.view(len(blocks), count, -1).transpose(0, 1).reshape(count, tokens, -1).contiguous()
        exact = ~(values.view(count, tokens, heads, dim).abs().amax(3).float() < float(LARGEST))
        exact[:, : plain.sinks] = True
        exact = exact.view(torch.uint8)
        turns = self.turns(plain.turns.tobytes(), tokens)
        numbers = {"tokens": tokens, "channels": channels, "dim": dim, "pairs": turns.shape[1], "first": plain.first}
        bits = values.view(torch.uint16) if dtype == "bfloat16" else values
        of = _Values(bits, exact, turns, numbers | {"planes": planes})
        codes, anchors = self._parameters(of, self.put(plain.steps).view(count, 1), block_tokens)
        classes, residuals = self._residuals(of, codes, anchors)
        streams, room = int(streams_of(channels, plain.groups)), tokens * LANES * plain.groups
        words = torch.empty((count, streams, room), dtype=torch.uint16, device=self.device)
        lengths = torch.empty((count, streams), dtype=torch.int32, device=self.device)
        states = torch.empty((count, streams, LANES), dtype=torch.uint32, device=self.device)
        triton_kernels.encode(residuals, classes, self._encoder, words, lengths, states, groups=plain.groups)
        parts = lengths, states.view(count, -1), codes.to(torch.uint8), classes, anchors
        return self._written(plain, values, exact, words, parts, planes)

    def _parameters(self, of: _Values, relative: Any, block_tokens: int) -> tuple[Any, Any]:
        """codes int64 [planes, heads], anchors int16 [planes, channels]. relative: steps, float32 [planes, 1]."""
        (count, _, channels), heads, planes = of.bits.shape, of.exact.shape[2], of.numbers["planes"]
        dim, pairs, first = channels // heads, of.turns.shape[1], of.numbers["first"]
        sums, squares = torch.empty((2, count, channels), dtype=torch.float64, device=self.device)
        triton_planes.moments[(count, triton.cdiv(channels, _CHANNELS))](
            of.bits, of.exact, of.turns, sums, squares, **of.numbers,
            BLOCK_TOKENS=block_tokens, CHANNELS=_CHANNELS, UNROLL=_UNROLL, enable_fp_fusion=False,
        )  # fmt: skip
        kept = _kept(of.exact)
        squares = squares.view(count, heads, dim)
        mean = sums.view(count, heads, dim) / kept
        flat = mean * mean
        spread = (squares / kept - flat).clamp(min=0)
        one, other = (slice(begin, begin + pairs) for begin in (first, first + pairs))
        together = ((squares[..., one] + squares[..., other]) / kept - flat[..., one] - flat[..., other]).clamp(min=0)
        more = together - (spread[..., one] + spread[..., other])
        more.view(count // planes, planes, heads, pairs)[:, 1:] = 0
        terms = torch.cat([spread, more], 2)
        variance = torch.empty((count, heads), dtype=torch.float64, device=self.device)
        rows = count * heads
        triton_planes.total[(triton.cdiv(rows, _ROWS),)](
            terms, variance, rows, LENGTH=terms.shape[2], ROWS=_ROWS, UNROLL=_UNROLL, enable_fp_fusion=False
        )
        least = _over(mean.abs().amax(2), MOST_ANCHOR).clamp(min=LEAST_STEP)
        step = torch.maximum(relative.double() * _over(variance.clamp(min=0), dim).sqrt(), least)
        codes = torch.searchsorted(self._step_edges, step)
        anchors = (mean / self._steps[codes].double()[..., None]).round().clamp(-MOST_ANCHOR, MOST_ANCHOR)
        return codes, anchors.to(torch.int16).view(count, channels)

    def _residuals(self, of: _Values, codes: Any, anchors: Any) -> tuple[Any, Any]:
        """classes uint8 [planes, channels], residuals int16 [planes, tokens, channels]."""
        (count, tokens, heads), channels, dim = of.exact.shape, of.numbers["channels"], of.numbers["dim"]
        residuals = torch.empty((count, tokens, channels), dtype=torch.int16, device=self.device)
        powers = torch.zeros((count, heads, dim), dtype=torch.int64, device=self.device)
        padded = triton.next_power_of_2(dim)
        some = max(1, _TILE // padded)
        triton_planes.subtract[(count * heads, triton.cdiv(tokens, some))](
            of.bits, of.exact, self._inverses[codes], anchors, of.turns, residuals, powers, **of.numbers,
            FAR=int(FAR), MOST=MOST_ANCHOR, TOKENS=some, DIM=padded, enable_fp_fusion=False,
        )  # fmt: skip
        deviation = (powers.double() / _kept(of.exact)).sqrt()
        classes = self._classes[torch.searchsorted(self._class_edges, deviation)].view(count, channels)
        reach = (tables.HALF << (classes >> 4).to(torch.int16))[:, None]
        far = (residuals >= reach) | (residuals < -reach)
        of.exact.bitwise_or_(far.view(count, tokens, heads, dim).any(3))
        residuals.view(count, tokens, heads, dim).masked_fill_(of.exact.bool()[..., None], 0)
        return classes, residuals

    def _written(
        self, plain: Plain, values: Any, exact: Any, words: Any, parts: tuple[Any, ...], planes: int
    ) -> Octets | None:
        """The planes' sections, one behind the other: see `sections`."""
        (count, streams, room), lengths, vectors = words.shape, parts[0], exact[0].numel()
        size = values.numel() // exact.numel() * values.element_size()
        found, given = exact.view(count, -1).sum(1), 2 * lengths.sum(1)
        heads = torch.cat([_padded(part) for part in (found.to(torch.int32)[:, None], *parts)], 1)
        fixed = heads.shape[1]
        ends = plain.begin + (fixed + 4 * found + _up(found * size) + _up(given)).cumsum(0)
        begins = torch.cat([torch.full_like(ends[:1], plain.begin), ends[:-1]])
        out = torch.zeros(plain.limit + -plain.limit % 4, dtype=torch.uint8, device=self.device)
        out.view(torch.int32)[sections.HEADER_WORDS :][: count // planes] = begins[::planes]
        fits, target = ends[-1] <= plain.limit, out.view(torch.uint16)

        def copy(source: Any, counts: Any, *runs: Any) -> None:
            """Runs of bytes, [planes, n] or what becomes it: begins in the source, places, lengths."""
            froms, places, lengths = (run.contiguous() for run in torch.broadcast_tensors(*runs))
            source, n, counts = source.view(torch.uint16), froms.shape[1], fits * counts
            grid = count, min(n, _COPIERS)
            triton_planes.copy[grid](source, froms, target, places, lengths, counts, n, WORDS=_WORDS)

        plane, rank = torch.arange(count, device=self.device)[:, None], torch.arange(vectors, device=self.device)
        places = exact.view(count, -1).argsort(dim=1, descending=True, stable=True)
        places_at, words_at = begins[:, None] + fixed, (ends - _up(given))[:, None]
        vectors_at = places_at + 4 * found[:, None]
        one = torch.ones_like(found)
        copy(heads, one, plane * fixed, begins[:, None], one[:, None] * fixed)
        copy(places.to(torch.int32), one, plane * (4 * vectors), places_at, 4 * found[:, None])
        copy(values, found, (plane * vectors + places) * size, vectors_at + rank * size, one[:, None] * size)
        sizes = 2 * lengths.long()
        rooms = 2 * room * torch.arange(1, count * streams + 1, device=self.device).view(count, streams)
        copy(words, one * streams, rooms - sizes, words_at + sizes.cumsum(1) - sizes, sizes)
        end = int(ends[-1])
        if end > plain.limit:
            return None
        stored: Octets = torch.empty(end, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()
        torch.from_numpy(stored).copy_(out[:end])
        return stored


def _kept(exact: Any) -> Any:
    """How many vectors of a head are not exact, at least 1: float64 [planes, heads, 1]."""
    return (exact == 0).sum(1).clamp(min=1).double()[..., None]


def _over(numbers: Any, divisor: int) -> Any:
    """The quotients: by a number that is no tensor torch does not divide on a GPU, but multiplies by its reciprocal."""
    return numbers / torch.full_like(numbers, divisor)


def _up(sizes: Any) -> Any:
    """`parts.up`, of a tensor."""
    return (sizes + 3) & ~3


def _padded(part: Any) -> Any:
    """Rows as bytes, each a multiple of 4."""
    part = part.view(torch.uint8)
    return torch.nn.functional.pad(part, (0, -part.shape[1] % 4))
