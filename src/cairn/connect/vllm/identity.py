"""What a request's KV depends on beside its tokens: adapter, tenant, pictures."""

from typing import Any

import msgspec

from cairn.kv import Namespace


def reusable(request: Any) -> bool:
    """Whether a request's KV is a function of what its keys are made of."""
    return request.prompt_embeds is None and not getattr(request, "resumable", False)


def namespace_of(base: Namespace, request: Any, epoch: bytes, adapter: str) -> Namespace:
    """The namespace of one request: its LoRA and its salt.

    epoch: set anew by every reset of the cache. adapter: of `Adapters.identity`.
    """
    salt = request.cache_salt
    if not adapter and salt is None and not epoch:
        return base
    # Length first, so that no salt and epoch read like another salt and epoch.
    secret = epoch if salt is None else len(epoch).to_bytes(2, "little") + epoch + salt.encode()
    return msgspec.structs.replace(base, lora=adapter, salt=secret)


def pictures(request: Any, block_tokens: int) -> dict[int, list[tuple[str, int]]]:
    """By block, which pictures (or sounds) lie in it: (identifier, where it begins, from the block's first token)."""
    found: dict[int, list[tuple[str, int]]] = {}
    for feature in request.mm_features:
        start = feature.mm_position.offset
        for block in range(start // block_tokens, (start + feature.mm_position.length - 1) // block_tokens + 1):
            found.setdefault(block, []).append((feature.identifier, start - block * block_tokens))
    return found


def extra_keys(request: Any, block_tokens: int) -> dict[int, bytes]:
    """Content beyond the token ids, by block: which picture (or sound) lies in it, and where."""
    return {
        block: msgspec.json.encode([f"{identifier}@{offset}" for identifier, offset in items])
        for block, items in pictures(request, block_tokens).items()
    }
