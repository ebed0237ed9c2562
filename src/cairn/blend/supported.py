"""Which models blending can serve, by their Hugging Face config, and why not the others."""

from typing import Any, Final

from cairn.errors import GeometryError
from cairn.kv.geometry import refuse_stateful

#: Decoder layers of one and the same shape: RoPE over whole heads, grouped queries, plain causal attention.
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
#: Frequencies that do not depend on the prompt's length. (NTK in itself is another `rope_theta`.)
FIXED_ROPES: Final = ("default", "linear", "yarn", "llama3")


def refuse_blending(config: Any, *, ropes: tuple[str, ...] = FIXED_ROPES) -> None:
    """Raises GeometryError, with the reason, for a model whose chunks cannot be moved to other positions.

    config: the model's, as `transformers` reads it. ropes: kinds of RoPE whose frequencies the caller keeps fixed.
    """
    kind = getattr(config, "model_type", "?")
    rope = getattr(config, "rope_parameters", None) or {}
    reasons = {
        "MLA's latent holds no key that could be turned": getattr(config, "kv_lora_rank", None),
        "ALiBi adds positions to scores, and not to keys": getattr(config, "alibi", False) or kind in ("bloom", "mpt"),
        "its positions have several axes (mrope)": "mrope_section" in rope,
        "only a part of each head is turned (partial rotary)": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "some of its layers know no positions (NoPE)": 0 in (getattr(config, "no_rope_layers", None) or ()),
        "it has no RoPE": "rope_theta" not in rope,
        f"RoPE of type {rope.get('rope_type')!r} depends on the prompt's length": rope.get("rope_type") not in ropes,
        f"{kind!r} is none of {', '.join(FAMILIES)}": kind not in FAMILIES,
    }
    try:
        refuse_stateful(config)
    except GeometryError as error:
        raise _refusal(str(error).partition(":")[0] + " is no full attention in every layer") from error
    for reason, holds in reasons.items():
        if holds:
            raise _refusal(reason)


def _refusal(reason: str) -> GeometryError:
    return GeometryError(f"blending is not possible: {reason}; set blending.enabled to false")
