"""From a payload on the wire to events of the fleet. What is not understood is counted and left out, never raised."""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from cairn.fleet.base import Cleared, Event, Removed, Stored, StoredMany, Tier
from cairn.fleet.metrics import FleetMetrics, Skip
from cairn.fleet.msgpack import Payloads, parse_tokens
from cairn.fleet.plain import ANY_TIER, CLEARED, OTHER, REMOVED
from cairn.fleet.scan import Scan, scan
from cairn.fleet.separation import ExtraKeysError, namespace_digest, separate
from cairn.fleet.wire import (
    KNOWN,
    MAX_PAYLOAD,
    ArrayBatch,
    MapBatch,
    WireEvent,
    WireRemoved,
    WireStored,
    decode_arrays,
    decode_extra_keys,
    decode_lookahead,
    decode_maps,
    decode_one,
    decode_raw,
    tag_of,
)

#: vLLM: GPU, CPU, STORAGE (0.26: FS, OBJ). SGLang: GPU, CPU_PINNED, DISK, EXTERNAL.
_TIERS: Final = {
    "GPU": Tier.VRAM,
    "CPU": Tier.CPU,
    "CPU_PINNED": Tier.CPU,
    "STORAGE": Tier.DISK,
    "DISK": Tier.DISK,
    "FS": Tier.DISK,
    "OBJ": Tier.REMOTE,
    "EXTERNAL": Tier.REMOTE,
}

#: Groups whose blocks, held from the first on, are a prefix. Others hold what a window or a state needs.
_FULL: Final = frozenset({"full_attention", "mla_attention", "sink_full_attention"})

_CLEARED: Final = Cleared()
_NIL: Final = b"\xc0"
_MOST_NILS: Final = 1 << 16
_TIME: Final = struct.Struct(">d")

_Decode = Callable[[bytes], MapBatch | ArrayBatch]


class Batch(NamedTuple):
    """time: of publishing, seconds since the epoch; of several at once, the first's. rank: data-parallel; None: not
    told. events: may be empty. understood: how many these are, each counted by itself.
    """

    time: float
    rank: int | None
    events: list[Any]
    understood: int


class _SkipError(Exception):
    """An event is left out, for this reason."""

    def __init__(self, reason: Skip) -> None:
        self.reason = reason


class Decoder:
    """Decodes one source's batches; a source that has restarted gets a new one. For one thread at a time.

    It remembers what the source has told about its KV groups. In a hybrid model only one group goes on to the index,
    the first full-attention one: its blocks lie as those of a model without groups do, further ones are told in step
    with it, and what a window or a state leaves behind says nothing about a prefix.

    many: plain events come as `StoredMany` and merged `Removed`, straight from the bytes (`cairn.fleet.scan`). They say
    the same; their arrays stand until the thread decodes again. copies: what `Stored` and `StoredMany` say.
    """

    def __init__(self, metrics: FleetMetrics, *, many: bool = False, copies: bool = True) -> None:
        self._metrics = metrics
        self._many = many
        self._copies = copies
        self._decoders: tuple[_Decode, _Decode] = (decode_maps, decode_arrays)
        self._full: dict[int, bool] = {}
        self._main: int | None = None

    def learnt(self) -> tuple[dict[int, bool], int | None]:
        """What it remembers: by group, whether its attention is full; and the group that goes on to the index."""
        return dict(self._full), self._main

    def resume(self, full: Mapping[int, bool], main: int | None) -> None:
        """Remembers what another has learnt."""
        self._full, self._main = dict(full), main

    def decode(self, payload: bytes) -> Batch | None:
        """The batch in a payload, without what cannot be understood; None if it is no batch at all."""
        return self.decode_first(Payloads.of((payload,)))[0]

    def decode_first(self, payloads: Payloads) -> tuple[Batch | None, int]:
        """The first of consecutive payloads (one at least) as `decode` has it; with `many` as many as can be had at
        once and are of one rank, as one batch. Also how many these are.
        """
        small = self._many and payloads.sizes.max() <= MAX_PAYLOAD
        if small and (scanned := scan(payloads, self._main)) is not None:
            return self._scanned(scanned), scanned.payloads
        return self._decode(payloads.one(0)), 1

    def _decode(self, payload: bytes) -> Batch | None:
        if len(payload) > MAX_PAYLOAD:
            self._metrics.fleet_skipped_batches.add(1, reason=Skip.TOO_LARGE)
            return None
        try:
            batch = self._typed(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._one_by_one(payload)
        return self._batch(batch.ts, batch.data_parallel_rank, batch.events)

    def _batch(self, time: float, rank: int | None, wire: Iterable[WireEvent]) -> Batch:
        events = self._events(wire)
        return Batch(time, rank, events, len(events))

    def _scanned(self, scanned: Scan) -> Batch:
        """What a scan found, and what it left to msgspec, in order."""
        events: list[Event | StoredMany] = []
        count = 0
        for kind, tier, size, first, stop, block, behind, token, start, end in scanned.runs:
            if kind == OTHER:
                event = self._event(msgspec.Raw(scanned.memory[start:end].tobytes()))
                known = self._events(() if event is None else (event,))
                events += known
                count += len(known)
                continue
            count += stop - first
            hashes = scanned.hashes[block:behind]
            if kind == CLEARED:
                events.append(_CLEARED)
            elif kind == REMOVED:
                events.append(Removed(tuple(hashes.tolist()), None if tier == ANY_TIER else Tier(tier), None))
            else:
                tokens = scanned.tokens[token : token + size * len(hashes)].reshape(-1, size)
                events.append(StoredMany(hashes, scanned.told[first:stop], tokens, Tier(tier), self._copies))
        return Batch(_TIME.unpack_from(scanned.memory.data, scanned.first + 2)[0], scanned.rank, events, count)

    def _typed(self, payload: bytes) -> MapBatch | ArrayBatch:
        first, second = self._decoders
        try:
            return first(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            batch = second(payload)
            self._decoders = second, first  # a source keeps to its encoding
            return batch

    def _one_by_one(self, payload: bytes) -> Batch | None:
        """The slow way: an event that is not as expected must not cost the others."""
        try:
            batch = decode_raw(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._metrics.fleet_skipped_batches.add(1, reason=Skip.NOT_A_BATCH)
            return None
        known = [event for raw in batch.events if (event := self._event(raw)) is not None]
        return self._batch(batch.ts, batch.data_parallel_rank, known)

    def _event(self, raw: msgspec.Raw) -> WireEvent | None:
        try:
            return decode_one(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        try:
            self._skip(Skip.MALFORMED if tag_of(raw) in KNOWN else Skip.UNKNOWN_TAG)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._skip(Skip.MALFORMED)
        return None

    def _events(self, wire: Iterable[WireEvent]) -> list[Event]:
        events: list[Event] = []
        for one in wire:
            try:
                if isinstance(one, WireStored):
                    events.append(self._stored(one))
                elif isinstance(one, WireRemoved):
                    events.append(self._removed(one))
                else:
                    events.append(_CLEARED)
            except _SkipError as skipped:
                self._skip(skipped.reason)
        return events

    def _stored(self, wire: WireStored) -> Stored:
        blocks = len(wire.block_hashes)
        if not blocks:
            raise _SkipError(Skip.EMPTY)
        tier = _tier(wire.medium, wire.locality)
        self._check_group(wire.group_idx, wire.kv_cache_spec_kind)
        tokens = _tokens(wire, blocks)
        namespace, extra = _separation(wire, blocks)
        names, parent = wire.block_hashes, wire.parent_block_hash
        return Stored(names, parent, tokens, wire.block_size, tier, namespace, extra, self._copies)

    def _removed(self, wire: WireRemoved) -> Removed:
        if not wire.block_hashes:
            raise _SkipError(Skip.EMPTY)
        tier = None if wire.medium is None else _tier(wire.medium, wire.locality)
        group = wire.group_idx
        if group is None or group == self._main:
            return Removed(wire.block_hashes, tier, None)
        if group in self._full:
            raise _SkipError(Skip.OTHER_GROUP if self._full[group] else Skip.NOT_FULL_ATTENTION)
        return Removed(wire.block_hashes, tier, group)

    def _check_group(self, group: int | None, kind: str | None) -> None:
        """Lets pass what belongs to the source's main group, which is chosen here."""
        if kind is not None and kind not in _FULL:
            if group is not None:
                self._full[group] = False
            raise _SkipError(Skip.NOT_FULL_ATTENTION)
        if group is None or group == self._main:
            return
        full = self._full.get(group, kind is not None or group == 0)
        if not full:
            raise _SkipError(Skip.NOT_FULL_ATTENTION if group in self._full else Skip.UNKNOWN_GROUP)
        if kind is not None:
            self._full[group] = True
        if self._main is None:
            self._main = group
        elif group != self._main:
            raise _SkipError(Skip.OTHER_GROUP)

    def _skip(self, reason: Skip) -> None:
        self._metrics.fleet_skipped_events.add(1, reason=reason)


def _tier(medium: str | None, locality: str | None) -> Tier:
    if medium is None:
        return Tier.VRAM  # before mediums there was one
    tier = _TIERS.get(medium)
    if tier is None:
        tier = _TIERS.get(medium.upper())
        if tier is None:
            raise _SkipError(Skip.UNKNOWN_MEDIUM)
    return Tier.REMOTE if locality == "REMOTE" else tier


def _tokens(wire: WireStored, blocks: int) -> Sequence[int]:
    """The tokens of exactly `blocks` blocks, or none for a tokenless event."""
    tokens = parse_tokens(wire.token_ids)
    if tokens is None:
        raise _SkipError(Skip.MALFORMED)
    needed, size = blocks * wire.block_size, wire.block_size
    if len(tokens) == needed or not tokens:
        return tokens
    if len(tokens) < needed or not size:
        raise _SkipError(Skip.TOKEN_COUNT)
    # Null blocks have no hash but tokens: a whole block's, so anything less is an unfinished block at the end.
    if len(tokens) >= needed + size:
        raise _SkipError(Skip.AMBIGUOUS)
    return tokens[:needed]


def _separation(wire: WireStored, blocks: int) -> tuple[bytes, tuple[bytes | None, ...]]:
    if _is_nils(bytes(wire.extra_keys), blocks) and bytes(wire.lookahead_token_ids) == _NIL:
        lora = wire.lora_name if wire.lora_name is not None else wire.lora_id
        return namespace_digest(lora), ()
    try:
        keys = decode_extra_keys(wire.extra_keys) or [None] * blocks
        lookahead = decode_lookahead(wire.lookahead_token_ids) or []
        if len(keys) != blocks or len(lookahead) not in (0, blocks):
            raise _SkipError(Skip.EXTRA_KEYS)
        return separate(keys, wire.lora_name, wire.lora_id, lookahead, begins=wire.parent_block_hash is None)
    except ExtraKeysError:
        raise _SkipError(Skip.EXTRA_KEYS) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _SkipError(Skip.MALFORMED) from None


def _is_nils(raw: bytes, blocks: int) -> bool:
    """Whether these are the usual extra keys: none, told as nil or as one for each block. What is longer than any
    prompt is left to the decoder: here it would be kept.
    """
    return raw == _NIL or (blocks <= _MOST_NILS and raw == _nils(blocks))


@lru_cache(maxsize=256)
def _nils(blocks: int) -> bytes:
    return msgspec.msgpack.encode([None] * blocks)
