"""Batches from bytes to arrays in one kernel: runs of plain events that are alike (`cairn.fleet.plain`).

All other events are left to msgspec, by where they stand. A payload with anything else amiss is not touched.
"""

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.fleet.msgpack import NIL, Bytes, Payloads, Words, read_array, read_unsigned, skip
from cairn.fleet.plain import (
    ANY_TIER,
    BEGINS,
    BLOCK_TOKENS,
    BLOCKS,
    LEAST_BYTES,
    NOTES,
    OTHER,
    PARENT,
    REMOVED,
    STORED,
    TIER,
    TOKENS,
    read_event,
)
from cairn.index.slots import NONE
from cairn.jit import kernel, load_byte

Runs = npt.NDArray[np.int64]
RUN_COLUMNS = 10

#: A scratch for more bytes than these is not kept.
_MOST_KEPT = 1 << 21


class Scan(NamedTuple):
    """payloads: how many of them this is. memory: where they stand, from `first` on. rank: None: not told. runs: (kind,
    tier or ANY_TIER, block_tokens, events from, to, hashes from, to, tokens from, bytes from, to); `told` has a row for
    each event that stores, as `StoredMany` has it.
    """

    payloads: int
    memory: Bytes
    first: int
    rank: int | None
    runs: list[list[int]]
    hashes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    told: npt.NDArray[np.uint64]


class _Scratch(NamedTuple):
    """What a scan writes to: room for the worst that so many bytes may hold."""

    runs: Runs
    hashes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint32]
    told: npt.NDArray[np.uint64]


class _Kept(threading.local):
    """The scratch of a thread. Memory that is allocated anew costs more to touch than what is written to it."""

    scratch: _Scratch | None = None

    def room(self, size: int) -> _Scratch:
        """For `size` bytes of payloads."""
        if self.scratch is not None and len(self.scratch.tokens) >= size:
            return self.scratch
        scratch = _new_scratch(1 << max(16, (size - 1).bit_length()))
        if len(scratch.tokens) <= _MOST_KEPT:
            self.scratch = scratch
        return scratch


def _new_scratch(size: int) -> _Scratch:
    events = size // LEAST_BYTES + 1
    return _Scratch(
        np.empty((events, RUN_COLUMNS), np.int64),
        np.empty(size, np.uint64),
        np.empty(size, np.uint32),
        np.empty((events, 3), np.uint64),
    )


_kept = _Kept()


def scan(payloads: Payloads, group: int | None) -> Scan | None:
    """The events of consecutive batches, each `[ts: float64, events, rank?]`: of as many as are such, from the first
    on, have something plain in them, and are of one rank. None: of none.

    group: which KV group the index follows, as far as that is known. Takes some 20 bytes of address space for each byte
    of the payloads, and touches what it fills. The arrays stand until this thread scans again.
    """
    scratch, followed = _kept.room(int(payloads.sizes.sum())), NONE if group is None else group
    count, rank, found, stored, blocks, used = _scan(
        *payloads, followed, scratch.runs, scratch.hashes, scratch.tokens, scratch.told
    )
    if not count:
        return None
    hashes, tokens, told = scratch.hashes[:blocks], scratch.tokens[:used], scratch.told[:stored]
    runs = scratch.runs[:found].tolist()
    first, told_rank = int(payloads.spans[0, 0]), None if rank == NONE else rank
    return Scan(count, payloads.memory, first, told_rank, runs, hashes, tokens, told)


@kernel
def _read_rank(at: int, end: int) -> tuple[int, int]:
    """The rank that stands here, NONE if it is not told, and where it ends."""
    if at < end and load_byte(at) == NIL:
        return NONE, at + 1
    value, at = read_unsigned(at, end)
    return (int(np.int64(value)), at) if at != NONE and value < np.uint64(1 << 16) else (NONE, NONE)


@kernel
def _scan(
    memory: Bytes,
    spans: Words,
    group: int,
    runs: Runs,
    hashes: npt.NDArray[np.uint64],
    tokens: npt.NDArray[np.uint32],
    told: npt.NDArray[np.uint64],
) -> tuple[int, int, int, int, int, int]:
    """How many payloads, their rank, and how many runs, events that store, blocks and tokens were found."""
    notes, last_run = np.empty(NOTES, np.int64), np.empty(RUN_COLUMNS, np.int64)
    base = int(np.int64(memory.ctypes.data))
    found, stored, blocks, used, rank = 0, 0, 0, 0, NONE
    for payload in range(len(spans)):
        before, before_stored, before_blocks, before_used = found, stored, blocks, used
        first, stop = spans[payload, 0], spans[payload, 1]
        if found:
            for column in range(RUN_COLUMNS):
                last_run[column] = runs[found - 1, column]
        sound, told_rank, found, stored, blocks, used = _payload(
            base, first, stop, group, notes, runs, hashes, tokens, told, found, stored, blocks, used
        )
        if not sound or (payload and told_rank != rank):
            if before:
                for column in range(RUN_COLUMNS):
                    runs[before - 1, column] = last_run[column]
            return payload, rank, before, before_stored, before_blocks, before_used
        rank = told_rank
    return len(spans), rank, found, stored, blocks, used


@kernel
def _begin(
    runs: Runs, row: int, kind: int, tier: int, size: int, stored: int, blocks: int, used: int, start: int
) -> None:
    """A run without events yet, whose bytes begin at `start`."""
    runs[row, 0], runs[row, 1], runs[row, 2], runs[row, 3], runs[row, 4] = kind, tier, size, stored, stored
    runs[row, 5], runs[row, 6], runs[row, 7], runs[row, 8] = blocks, blocks, used, start


@kernel
def _payload(
    base: int,
    first: int,
    stop: int,
    group: int,
    notes: npt.NDArray[np.int64],
    runs: Runs,
    hashes: npt.NDArray[np.uint64],
    tokens: npt.NDArray[np.uint32],
    told: npt.NDArray[np.uint64],
    found: int,
    stored: int,
    blocks: int,
    used: int,
) -> tuple[bool, int, int, int, int, int]:
    """Reads the payload from first to stop behind the address `base`, and adds to the runs. Whether it is as it should
    be; its rank; and, if it is, how far everything is filled by then.
    """
    at, end = base + first, base + stop
    head = load_byte(at)
    if stop - first < 11 or load_byte(at + 1) != 0xCB or (head != 0x92 and head != 0x93):
        return False, NONE, found, stored, blocks, used
    events, at = read_array(at + 10, end)
    plain = not events
    noticed, to_hashes, to_tokens = notes.ctypes.data, hashes.ctypes.data, tokens.ctypes.data
    for _ in range(events):
        if at == NONE or at >= end or found == len(runs):
            return False, NONE, found, stored, blocks, used
        start = at
        kind, at = read_event(start, end, group, to_hashes + 8 * blocks, to_tokens + 4 * used, noticed)
        if kind == OTHER:
            at = skip(start, end)
        else:
            plain = True
        tier, size = (notes[TIER], notes[BLOCK_TOKENS]) if kind <= REMOVED else (ANY_TIER, 0)
        if kind == STORED and tier == ANY_TIER:
            tier = 0
        last = found - 1
        if not found or kind > REMOVED or runs[last, 0] != kind or runs[last, 1] != tier or runs[last, 2] != size:
            last = found
            _begin(runs, last, kind, tier, size, stored, blocks, used, start - base)
            found += 1
        runs[last, 4] += 1
        runs[last, 9] = at - base
        if kind <= REMOVED:
            blocks += notes[BLOCKS]
            runs[last, 6] = blocks
        if kind == STORED:
            used += notes[TOKENS]
            told[stored, 0] = np.uint64(notes[PARENT])
            told[stored, 1] = np.uint64(notes[BEGINS])
            told[stored, 2] = np.uint64(blocks - runs[last, 5])
            stored += 1
    rank = NONE
    if head == 0x93 and at != NONE:
        rank, at = _read_rank(at, end)
    return at == end and plain, rank, found, stored, blocks, used
