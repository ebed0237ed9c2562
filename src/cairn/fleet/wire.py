"""Batches of KV events as they stand on the wire: vLLM's and SGLang's msgpack, in both encodings.

A batch is `[time, events, data_parallel_rank]`. Before vLLM's PR 42892 an event was a positional array that begins with
its name, since then it is a map with the name under "type" and defaults left out (vllm/distributed/kv_events.py, which
SGLang's is a fork of). Only what is used is decoded; other fields are skipped unread, new ones too.
"""

from typing import Annotated, Any

import msgspec

#: The largest payload that is looked at, in bytes. A batch with a prompt of a million tokens has 5 MB. What decoding
#: takes is bounded by a small multiple of it: msgspec does not trust a length that the payload cannot hold.
MAX_PAYLOAD = 16 << 20

#: Data-parallel ranks of an instance.
RANKS = 1 << 16

Hash = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)] | int
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Group = Annotated[int, msgspec.Meta(ge=0, le=255)]

_NO_ARRAY = msgspec.Raw(b"\x90")
_NIL = msgspec.Raw(b"\xc0")


class WireStored(msgspec.Struct, gc=False):
    """Fields in vLLM's order, which is the positional encoding's; those that are not used are left undecoded."""

    block_hashes: tuple[Hash, ...]
    parent_block_hash: Hash | None = None
    token_ids: msgspec.Raw = _NO_ARRAY
    block_size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)] = 0
    lora_id: int | None = None
    medium: Text | None = None
    lora_name: Text | None = None
    extra_keys: msgspec.Raw = _NIL
    group_idx: Group | None = None
    kv_cache_spec_kind: Text | None = None
    kv_cache_spec_sliding_window: msgspec.Raw = _NIL
    locality: Text | None = None
    ownership: msgspec.Raw = _NIL
    session_id: msgspec.Raw = _NIL
    lookahead_token_ids: msgspec.Raw = _NIL


class WireRemoved(msgspec.Struct, gc=False):
    block_hashes: tuple[Hash, ...]
    medium: Text | None = None
    group_idx: Group | None = None
    locality: Text | None = None


class _MapStored(WireStored, tag="BlockStored"):
    pass


class _MapRemoved(WireRemoved, tag="BlockRemoved"):
    pass


class _MapCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _ArrayStored(WireStored, tag="BlockStored", array_like=True):
    pass


class _ArrayRemoved(WireRemoved, tag="BlockRemoved", array_like=True):
    pass


class _ArrayCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True, gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float


class MapBatch(_Batch):
    events: list[_MapStored | _MapRemoved | _MapCleared]
    data_parallel_rank: Annotated[int, msgspec.Meta(ge=0, lt=RANKS)] | None = None


class ArrayBatch(_Batch):
    events: list[_ArrayStored | _ArrayRemoved | _ArrayCleared]
    data_parallel_rank: Annotated[int, msgspec.Meta(ge=0, lt=RANKS)] | None = None


class RawBatch(_Batch):
    """A batch whose events are looked at one by one, because one of them is not as expected."""

    events: list[msgspec.Raw]
    data_parallel_rank: Annotated[int, msgspec.Meta(ge=0, lt=RANKS)] | None = None


class _MapTag(msgspec.Struct):
    type: str


class _ArrayTag(msgspec.Struct, array_like=True):
    type: str


KNOWN = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})

decode_maps = msgspec.msgpack.Decoder(MapBatch).decode
decode_arrays = msgspec.msgpack.Decoder(ArrayBatch).decode
decode_raw = msgspec.msgpack.Decoder(RawBatch).decode
decode_extra_keys = msgspec.msgpack.Decoder(list[list[Any] | None] | None).decode

decode_lookahead = msgspec.msgpack.Decoder(list[list[int]] | None).decode

_one = (
    msgspec.msgpack.Decoder(_MapStored | _MapRemoved | _MapCleared).decode,
    msgspec.msgpack.Decoder(_ArrayStored | _ArrayRemoved | _ArrayCleared).decode,
)
_tag = (msgspec.msgpack.Decoder(_MapTag).decode, msgspec.msgpack.Decoder(_ArrayTag).decode)

WireEvent = _MapStored | _MapRemoved | _MapCleared | _ArrayStored | _ArrayRemoved | _ArrayCleared


def decode_one(raw: msgspec.Raw) -> WireEvent:
    """One event in either encoding. Raises msgspec.DecodeError, or RecursionError for a nest that has no bottom."""
    event: WireEvent = _one[_is_array(raw)](raw)
    return event


def tag_of(raw: msgspec.Raw) -> str:
    """An event's name. Raises as `decode_one`."""
    return _tag[_is_array(raw)](raw).type


def _is_array(raw: msgspec.Raw) -> bool:
    first = memoryview(raw)[0]
    return first >> 4 == 0x9 or first in (0xDC, 0xDD)
