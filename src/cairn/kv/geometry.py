"""What one KV block is: how many layers, heads, dimensions and tokens, of which dtype. Values only."""

from typing import Any, Literal, Self

import msgspec

from cairn.errors import GeometryError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1, "int8": 1}


class KVGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of the KV cache of one model shard.

    layers: decoder layers that hold KV. kv_heads: KV heads of this shard (1 for MQA and MLA). head_dim: elements of one
    K (or V) vector; for MLA the latent and the RoPE part together. planes: 2 (K and V), or 1 for MLA, whose latent
    serves as both. dtype: a name of `DTYPE_BYTES`. block_tokens: tokens of one KV block.

    Thread-safe (immutable). Raises GeometryError for a value out of range.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    block_tokens: int = 16
    planes: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.planes not in (1, 2):
            raise GeometryError(f"planes={self.planes}: must be 2 (K and V) or 1 (MLA latent)")
        if self.dtype not in DTYPE_BYTES:
            raise GeometryError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPE_BYTES)}")

    @classmethod
    def mla(cls, *, layers: int, latent_dim: int, rope_dim: int, dtype: str, block_tokens: int = 64) -> Self:
        """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent and one shared RoPE key a token."""
        head_dim = latent_dim + rope_dim
        return cls(layers=layers, kv_heads=1, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens, planes=1)

    @classmethod
    def from_hf(cls, config: Any, *, dtype: str, block_tokens: int = 16) -> Self:
        """From a Hugging Face `PretrainedConfig` (or anything with its attributes).

        Raises GeometryError for models whose KV is not plain full attention in every layer: they must be refused,
        never stored as something they are not.
        """
        refuse_stateful(config)
        layers = int(config.num_hidden_layers)
        if getattr(config, "kv_lora_rank", None):
            return cls.mla(
                layers=layers,
                latent_dim=int(config.kv_lora_rank),
                rope_dim=int(config.qk_rope_head_dim),
                dtype=dtype,
                block_tokens=block_tokens,
            )
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            kv_heads = 1  # Falcon, GPTBigCode
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token in one plane of one layer."""
        return self.kv_heads * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and planes."""
        return self.layers * self.planes * self.vector_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer, all planes."""
        return self.planes * self.block_tokens * self.vector_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layers * self.layer_bytes

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The canonical block: [layer, plane (k|v), token, head, dim]."""
        return self.layers, self.planes, self.block_tokens, self.kv_heads, self.head_dim

    def digest_fields(self) -> tuple[str, ...]:
        """What of the geometry a namespace must tell apart."""
        return tuple(f"{name}={getattr(self, name)}" for name in self.__struct_fields__)


def refuse_stateful(config: Any) -> None:
    """Raises GeometryError when a model mixes in layers whose KV is not a plain function of the whole prefix."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        raise GeometryError(
            f"layer_types={sorted(layer_types)}: only full attention can be reused by prefix; "
            "serve this model without Cairn"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise GeometryError(f"sliding_window={window}: windowed layers drop tokens; serve this model without Cairn")
    if getattr(config, "attention_chunk_size", None):
        raise GeometryError(f"attention_chunk_size={config.attention_chunk_size}: chunked attention is not supported")
