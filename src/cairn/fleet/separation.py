"""What separates blocks of equal tokens: adapter, tenant, content beyond the tokens. As digests, for index and asker.

vLLM publishes a block's extra keys untagged: LoRA name, (multimodal identifier, offset) pairs, cache salt (a prompt's
first block only), digests of prompt embeddings, in this order (vllm/v1/core/kv_cache_utils.py, to_event_extra_keys).
Cairn's own events carry a mark in the salt's place, on every block.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from cairn.kv.namespace import SALT_MARK, salt_mark

DIGEST_BYTES = 16

#: One extra key: a name or salt, a digest, or a pair of multimodal identifier and offset from the block's first token.
Item = str | bytes | int | tuple[str | bytes | int, ...]

_pack = msgspec.msgpack.Encoder().encode


class ExtraKeysError(ValueError):
    """Blocks of one prompt under two salts, or an extra key that is nothing of the above."""


def namespace_digest(lora: str | int | None = None, salt: str | None = None) -> bytes:
    """16 bytes, or b"" without adapter and salt. lora: its name (or its number, where an engine tells no more).
    salt: as the request has it, or its mark (`cairn.kv.namespace.salt_mark`).
    """
    if lora is None and salt is None:
        return b""
    mark = None if salt is None else salt if _is_mark(salt) else salt_mark(salt)
    return hashlib.blake2s(_pack((lora, mark)), digest_size=DIGEST_BYTES, person=b"cairn/fn").digest()


def extra_digest(items: Sequence[Item]) -> bytes | None:
    """16 bytes over a block's content beyond its tokens, in the engine's order; None without any."""
    if not items:
        return None
    return hashlib.blake2s(_pack(items), digest_size=DIGEST_BYTES, person=b"cairn/fx").digest()


def separate(
    blocks: Sequence[Sequence[Any] | None],
    lora_name: str | None,
    lora_id: int | None,
    lookahead: Sequence[Sequence[int]],
    *,
    begins: bool,
) -> tuple[bytes, tuple[bytes | None, ...]]:
    """Namespace and extra digests of an event's blocks from their extra keys.

    lookahead: by block, or empty: the tokens behind it that its hash covers too (vLLM 0.33 with lookahead
    hashing); they become content, the item ("lookahead", token, ...). begins: the first block begins a prompt.

    Raises ExtraKeysError.
    """
    lora = lora_name if lora_name is not None else lora_id
    salts: set[str] = set()
    extra: list[bytes | None] = []
    for at, block in enumerate(blocks):
        items = [_item(value) for value in block or ()]
        if lora_name is not None and items[:1] == [lora_name]:
            del items[0]
        salt = next((i for i, item in enumerate(items) if _is_salt(item, first=begins and at == 0)), None)
        if salt is not None:
            salts.add(str(items.pop(salt)))
        if lookahead and lookahead[at]:
            items.append(("lookahead", *lookahead[at]))
        extra.append(extra_digest(items))
    if len(salts) > 1:
        raise ExtraKeysError
    return namespace_digest(lora, salts.pop() if salts else None), tuple(extra) if any(extra) else ()


def _item(value: Any) -> Item:
    if isinstance(value, str | bytes | int):
        return value
    if isinstance(value, list | tuple) and all(isinstance(part, str | bytes | int) for part in value):
        return tuple(value)
    raise ExtraKeysError


def _is_salt(item: Item, *, first: bool) -> bool:
    return isinstance(item, str) and (first or _is_mark(item))


def _is_mark(salt: str) -> bool:
    return salt.startswith(SALT_MARK) and len(salt) == len(SALT_MARK) + 32
