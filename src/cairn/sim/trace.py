"""Request traces: what was asked when, as chains of block ids.

The first format is Mooncake's (Qin et al., FAST'25; github.com/kvcache-ai/Mooncake): a JSON object a line with
`timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, one id for each block of 512
prompt tokens. An id stands for its block and all before it, so equal ids mean equal prefixes; `read_trace` checks that.
`cairn.sim.logs` and `cairn.sim.recorded` read others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from cairn.errors import InputError

Keys = npt.NDArray[np.uint64]


_Id = Annotated[int, msgspec.Meta(le=(1 << 63) - 1)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _Row(msgspec.Struct):
    timestamp: float
    hash_ids: list[_Id]
    input_length: _Length = 0
    output_length: _Length = 0


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of their arrival. Read-only by convention, so threads may share it."""

    times: npt.NDArray[np.float64]  # [requests] seconds
    starts: npt.NDArray[np.int64]  # [requests + 1]: request i is blocks[starts[i] : starts[i + 1]]
    blocks: npt.NDArray[np.int64]  # [block uses] dense ids: 0 .. distinct - 1, by first use
    keys: Keys  # [distinct, 2] of the dense ids
    input_tokens: npt.NDArray[np.int64]  # [requests]; zeros where unknown
    output_tokens: npt.NDArray[np.int64]
    asked: npt.NDArray[np.int64]  # [requests] leading blocks that are the prompt's; the others are the answer's
    block_tokens: int = 512

    def __len__(self) -> int:
        return len(self.times)

    @property
    def block_uses(self) -> int:
        return len(self.blocks)

    def chain(self, request: int) -> Keys:
        """A request's keys [blocks, 2]."""
        return self.keys[self.blocks[self.starts[request] : self.starts[request + 1]]]

    def reused(self) -> npt.NDArray[np.int64]:
        """Leading blocks of each prompt that came before [requests]: what the largest cache could hit."""
        new = np.zeros(self.block_uses, np.int64)
        new[np.unique(self.blocks, return_index=True)[1]] = 1
        upto = np.concatenate([[0], np.cumsum(new)])
        reused: npt.NDArray[np.int64] = self.asked - (upto[self.starts[:-1] + self.asked] - upto[self.starts[:-1]])
        return reused

    def repeated(self, requests: int) -> "Trace":
        """As many requests, by copies of the trace behind one another. Copies share no block, as if each had users of
        its own: nothing more can be hit by that, and the rate stays.
        """
        copies = -(-requests // len(self))
        last = int(self.starts[-1])
        gap = float(self.times[-1] - self.times[0]) * len(self) / max(1, len(self) - 1)
        number = np.repeat(np.arange(copies), len(self))[:requests]
        starts = np.append((np.arange(copies)[:, None] * last + self.starts[:-1]).ravel(), copies * last)[
            : requests + 1
        ]
        blocks = (np.arange(copies)[:, None] * len(self.keys) + self.blocks).ravel()[: starts[-1]]
        return Trace(
            times=np.tile(self.times, copies)[:requests] + number * gap,
            starts=starts,
            blocks=blocks,
            keys=_keys(int(blocks.max()) + 1),
            input_tokens=np.tile(self.input_tokens, copies)[:requests],
            output_tokens=np.tile(self.output_tokens, copies)[:requests],
            asked=np.tile(self.asked, copies)[:requests],
            block_tokens=self.block_tokens,
        )

    @classmethod
    def of(
        cls,
        times: Sequence[float],
        chains: Sequence[Sequence[int]],
        lengths: Sequence[tuple[int, int]] | None = None,
        asked: Sequence[int] | None = None,
        block_tokens: int = 512,
    ) -> "Trace":
        """From times in seconds and chains of block ids, sorted by time here; equal times keep their order.

        lengths: tokens of each prompt and answer. asked: how many leading blocks are the prompt's; None: all.
        """
        order = np.argsort(np.asarray(times, np.float64), kind="stable")
        starts = np.zeros(len(chains) + 1, np.int64)
        np.cumsum([len(chains[i]) for i in order], out=starts[1:])
        flat = np.fromiter((block for i in order for block in chains[i]), np.int64, int(starts[-1]))
        _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        tokens = np.asarray(lengths if lengths is not None else np.zeros((len(chains), 2)), np.int64).reshape(-1, 2)
        return cls(
            times=np.asarray(times, np.float64)[order],
            starts=starts,
            blocks=rank[inverse],
            keys=_keys(len(first)),
            input_tokens=tokens[order, 0],
            output_tokens=tokens[order, 1],
            asked=np.asarray(asked, np.int64)[order] if asked is not None else np.diff(starts),
            block_tokens=block_tokens,
        )


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """Reads the first `limit` lines of a trace, all without one. Raises InputError with the number of a bad line."""
    times: list[float] = []
    chains: list[list[int]] = []
    lengths: list[tuple[int, int]] = []
    parents: dict[int, int] = {}
    decode = msgspec.json.Decoder(_Row).decode
    for number, line in lines(path, limit):
        try:
            row = decode(line)
        except msgspec.DecodeError as error:
            raise InputError(f"{path}, line {number}: {error}; a request is timestamp (ms) and hash_ids") from None
        _check(row.hash_ids, parents, f"{path}, line {number}")
        times.append(row.timestamp / 1000)
        chains.append(row.hash_ids)
        lengths.append((row.input_length, row.output_length))
    if not times:
        raise InputError(f"{path}: no requests; a trace has one JSON object a line")
    return Trace.of(times, chains, lengths)


def lines(path: Path, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The first lines of a file with something on them, and their numbers. Raises InputError."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and number > limit:
                    return
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a readable trace file") from None


def _check(chain: Iterable[int], parents: dict[int, int], where: str) -> None:
    """An id must always follow the same id, else it would not name a prefix."""
    before = -1
    for block in chain:
        if block < 0:
            raise InputError(f"{where}: hash id {block} is negative; ids count from 0")
        if parents.setdefault(block, before) != before:
            earlier = parents[block]
            raise InputError(f"{where}: id {block} follows {before} here and {earlier} earlier; an id names one prefix")
        before = block


def _keys(count: int) -> Keys:
    """Keys as evenly spread as digests: the dense ids, mixed by splitmix64 (Steele et al., OOPSLA'14)."""
    keys = np.empty((count, 2), np.uint64)
    with np.errstate(over="ignore"):
        x = (np.arange(2 * count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys[:] = (x ^ (x >> np.uint64(31))).reshape(count, 2)
    return keys
