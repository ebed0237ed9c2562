"""What a Transformers model is to Cairn: which models its prefix cache can serve, and what tells their KV apart."""

import inspect
import json
from typing import Any

import torch
import xxhash

from cairn.errors import GeometryError, InputError
from cairn.kv import KVGeometry, Namespace

#: Settings of a config that do not change what the model computes.
_INDIFFERENT = {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "torchscript"}

#: RoPE types whose angles depend on the length of the whole sequence: an early token's key changes as the prompt grows.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def geometry_of(model: Any, block_tokens: int = 16) -> KVGeometry:
    """The geometry of a `PreTrainedModel`'s cache.

    Raises GeometryError for models whose cache is not one (K, V) pair of [batch, kv_heads, tokens, head_dim] a layer on
    the CPU that depends on the token ids before it alone.
    """
    config = model.config
    refuse_model(model)
    return KVGeometry.from_hf(config, dtype=str(model.dtype).removeprefix("torch."), block_tokens=block_tokens)


def decoder_of(model: Any) -> Any:
    """The module that is given token ids and the cache: what a head calls, which OPT's does past its base model."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def refuse_model(model: Any) -> None:
    """Raises GeometryError for a model that the Transformers connector cannot serve, saying why."""
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_heterogeneous", False):  # what differs may not be asked of the config itself
        raise GeometryError(f"{name}: its layers differ from one another; serve this model without Cairn")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    ways = {getattr(part, "is_causal", None) for part in model.modules()}
    reasons = {
        "its cache also holds encoder states": config.is_encoder_decoder,
        "what it computes depends on more than token ids": config.get_text_config(decoder=True) is not config,
        "its attention looks both ways": any(way is False for way in ways),
        "its attention looks both ways, as is_decoder=False in its config says; set it to true where that is wrong": (
            getattr(config, "is_decoder", True) is False and True not in ways
        ),
        "its state is recurrent": getattr(model, "_is_stateful", False),
        "Transformers keeps MLA expanded, not as a latent": bool(getattr(config, "kv_lora_rank", None)),
        "some of its layers share the KV of others": bool(getattr(config, "num_kv_shared_layers", None)),
        f"its RoPE of type {rope!r} turns early tokens by the length of the prompt": rope in _LENGTH_DEPENDENT_ROPE,
        "an adapter is loaded, which changes its KV; merge it first": bool(
            getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None)
        ),
        "it keeps no KV cache": "past_key_values" not in inspect.signature(decoder_of(model).forward).parameters,
        f"its weights are on {', '.join(devices)}, and this connector copies CPU tensors": devices != ["cpu"],
    }
    for reason, holds in reasons.items():
        if holds:
            raise GeometryError(f"{name}: {reason}; serve this model without Cairn")


def weights_revision(model: Any) -> str:
    """A digest of everything that a model's KV depends on: its config, and every byte of its weights and buffers.

    Reads all weights once (XXH3-128, at memory speed). Weights that are changed later are not seen: then make a new
    connector.
    """
    settings = {key: value for key, value in config_of(model).items() if key not in _INDIFFERENT}
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            digest.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"xxh3:{digest.hexdigest()}"


def config_of(model: Any) -> dict[str, Any]:
    """The model's config as plain values."""
    return dict(json.loads(model.config.to_json_string(use_diff=False)))


def namespace_of(
    model: Any, *, name: str | None = None, revision: str | None = None, salt: bytes = b"", block_tokens: int = 16
) -> Namespace:
    """The namespace of a model's KV. name: the model's class unless given (not its path: a copy elsewhere shares its
    blocks); revision: `weights_revision` unless given; to it is added how the model was quantized when it was loaded.
    Raises as `geometry_of`, and InputError for an empty revision.
    """
    geometry = geometry_of(model, block_tokens)
    if revision == "":
        raise InputError("revision='': must name the weights; leave it out to have them hashed")
    quantizer = getattr(model, "hf_quantizer", None)
    if revision and quantizer is not None:
        revision += f" quantization={quantizer.quantization_config.quant_method}"
    return Namespace(
        model=name or type(model).__name__,
        revision=revision or weights_revision(model),
        layout="canonical",
        geometry=geometry,
        salt=salt,
    )
