"""Tiny random models of each family, and their KV as plain prefill computes it."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cairn.blend import Canvas, Planes

VOCABULARY = 96
LAYERS = 3


def model_of(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "sliding_window": None,
    }
    if family == "llama":
        del settings["sliding_window"]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**settings, **changes})).eval()


def tokens_of(seed: int, length: int) -> Any:
    return np.random.default_rng(seed).integers(0, VOCABULARY - 2, length).astype(np.uint32)


@torch.inference_mode()
def prefill(model: Any, tokens: Any) -> list[Planes]:
    """The KV of a prompt, [tokens, heads, dim] a plane."""
    cache = DynamicCache(config=model.config)
    model(torch.from_numpy(tokens.astype(np.int64))[None], past_key_values=cache)
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


class Memory(Canvas):
    """A canvas whose planes are all there. order: what was asked of it."""

    def __init__(self, planes: list[Planes]) -> None:
        self.planes = planes
        self.order: list[tuple[str, int]] = []

    @classmethod
    def empty(cls, like: list[Planes]) -> "Memory":
        return cls([(torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)) for k, v in like])

    def load(self, layer: int) -> Planes:
        self.order.append(("load", layer))
        return self.planes[layer]

    def finish(self, layer: int) -> None:
        self.order.append(("finish", layer))
