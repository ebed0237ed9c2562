"""How this engine's rows hold a block, where that can be proved: then engines of other kinds, and with other degrees of
parallelism, share its objects.

vLLM's backends lay out a page as their attention reads it best, and say nowhere how. On the CPU we let vLLM's own
operator write numbered values into a page and look whether they come out in order. What is not proved so stays opaque,
in a namespace of its own.
"""

from typing import Any

import numpy as np

from cairn.errors import GeometryError
from cairn.kv import KVGeometry, Layout, Part

#: Numbers of 7 bits are exact in every dtype; three of them number all values of a page.
_DIGIT_BITS, _DIGITS = 7, 3


def layout_of(vllm_config: Any, shards: tuple[KVGeometry, ...], stages: int, whole: KVGeometry, page: str) -> Layout:
    """The layout of a row. shards: as in `Served`. whole: all of them together. page: the platform, and vLLM's name for
    the order of dimensions.

    Raises GeometryError, with the reason, where it is not known or where ranks hold the same heads.
    """
    model = vllm_config.model_config
    heads = model.get_total_num_kv_heads()
    if whole.planes != 2:
        raise GeometryError("every rank holds the model's whole MLA latent")
    if whole.kv_heads != heads:
        raise GeometryError(f"{whole.kv_heads} heads in {len(shards)} ranks repeat the model's {heads} KV heads")
    if whole.dtype.startswith("float8") or whole.element_bytes == 1:
        raise GeometryError(f"KV of dtype {whole.dtype} has scales that are the engine's own")
    if not page.startswith("cpu:") or not _is_cpu_page(model.dtype, shards[0], vllm_config.cache_config.cache_dtype):
        raise GeometryError(f"the order of values in pages ({page}) is not known")
    return Layout.of("vllm_cpu", tuple(_parts(shards, len(shards) // stages)), whole)


def _parts(shards: tuple[KVGeometry, ...], ranks: int) -> list[Part]:
    """Stages one behind the other, and in each stage its ranks."""
    parts, first_layer = [], 0
    for start in range(0, len(shards), ranks):
        for rank, shard in enumerate(shards[start : start + ranks]):
            parts.append(Part(first_layer, shard.layers, rank * shard.kv_heads, shard.kv_heads))
        first_layer += shards[start].layers
    return parts


def _is_cpu_page(dtype: Any, shard: KVGeometry, cache_dtype: str) -> bool:
    """Whether vLLM's operator writes pages as `vllm_cpu` says: tried with numbered values, a digit at a time."""
    import torch

    try:
        from vllm._custom_ops import cpu_attn_reshape_and_cache
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, shard.block_tokens, shard.head_dim, cache_dtype)
    except (ImportError, TypeError, NotImplementedError):
        return False
    tokens, heads, dim = shard.block_tokens, shard.kv_heads, shard.head_dim
    layer = KVGeometry(layers=1, kv_heads=heads, head_dim=dim, dtype=shard.dtype, block_tokens=tokens)
    numbers = torch.arange(2 * tokens * heads * dim).reshape(2, tokens, heads, dim)
    if numbers.numel() > 1 << _DIGIT_BITS * _DIGITS:
        return False
    block = np.empty(layer.block_bytes, np.uint8)
    for digit in range(_DIGITS):
        keys, values = ((numbers >> digit * _DIGIT_BITS) & (1 << _DIGIT_BITS) - 1).to(dtype)
        page = torch.full((1, heads, 2 * tokens, dim), -1, dtype=dtype)
        try:
            cpu_attn_reshape_and_cache(keys, values, *page.chunk(2, dim=2), torch.arange(tokens), isa)
        except (TypeError, RuntimeError, AttributeError):
            return False
        Layout("vllm_cpu").to_canonical(page.view(torch.uint8).reshape(-1).numpy(), block, layer)
        if block.tobytes() != torch.stack((keys, values)).view(torch.uint8).numpy().tobytes():
            return False
    return True
