"""Events as engines write them: vLLM's structs, in the encoding of 0.26 and later and in the one before."""

from typing import Any

import msgspec

FIELDS = {
    "BlockStored": [
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
        "ownership",
        "session_id",
        "lookahead_token_ids",
    ],
    "BlockRemoved": ["block_hashes", "medium", "group_idx", "locality", "ownership"],
    "AllBlocksCleared": [],
}

#: Always written as a map, as vLLM's structs have no default for them.
REQUIRED = {"block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"}


def stored(hashes: list[Any], tokens: list[int], size: int, **fields: Any) -> dict[str, Any]:
    """parent None and medium "GPU" unless said otherwise."""
    given = {"parent_block_hash": None, "lora_id": None, "medium": "GPU", "lora_name": None} | fields
    return {"type": "BlockStored", "block_hashes": hashes, "token_ids": tokens, "block_size": size} | given


def removed(hashes: list[Any], **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"} | fields


def cleared() -> dict[str, Any]:
    return {"type": "AllBlocksCleared"}


def encode(events: list[Any], encoding: str = "maps", rank: int | None = 0, time: float = 1.5) -> bytes:
    """A batch. encoding: maps (with defaults left out), arrays, or old (arrays up to lora_id, as the first had)."""
    made = [as_array(event, encoding) if encoding != "maps" and isinstance(event, dict) else event for event in events]
    return msgspec.msgpack.encode([time, made, rank])


def as_array(event: dict[str, Any], encoding: str) -> list[Any]:
    names = FIELDS.get(event["type"], [])
    if encoding == "old":
        names = names[: 5 if event["type"] == "BlockStored" else 1]
    return [event["type"], *(event.get(name) for name in names)]
