"""A tiny random model whose logits depend strongly on every token, and greedy decoding with and without a cache."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cairn.config import load_config
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine

VOCABULARY = 96
BLOCK = 16


def tiny_config(**changes: Any) -> LlamaConfig:
    """Three layers, grouped-query attention; weights wide enough that a wrong prefix shows in the logits."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).eval()


def open_engine(
    model: Any, *, dram_blocks: int = 256, disk: Path | None = None, disk_bytes: int = 8 << 20, **settings: Any
) -> CacheEngine:
    """An engine that loads every hit, so that what is reused follows from what is stored alone."""
    overrides: dict[str, Any] = {"engine.planner": False, "engine.copy_threads": 1, **settings}
    namespace = namespace_of(model)
    stride = -(-namespace.geometry.block_bytes // 4096) * 4096
    overrides["storage.cpu.size"] = dram_blocks * stride
    if disk:
        overrides |= {"storage.disk.path": str(disk), "storage.disk.size": disk_bytes}
    return CacheEngine(namespace, load_config(environ={}, overrides=overrides))


def prompt(seed: int, length: int) -> torch.Tensor:
    """Token ids [1, length]; prompts of one seed are prefixes of one another."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, 1024)[:length])[None]


def figures(engine: CacheEngine) -> Any:
    """Everything the engine counts, by name."""
    return engine.get_stats()


def generate(model: Any, ids: torch.Tensor, cache: Any = None, new_tokens: int = 4, **settings: Any) -> Any:
    """Greedy: token ids [1, length + new_tokens] and the logits behind them [new_tokens, vocabulary]."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        **{"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **settings},
    )
    return out.sequences, torch.stack(out.logits)


def check(model: Any, connector: CairnConnector, ids: torch.Tensor, **settings: Any) -> Any:
    """Generates with Cairn, holds it to what plain Transformers does, and returns the cache, finished."""
    expected, expected_logits = generate(model, ids, **settings)
    with connector.cache(ids) as cache:
        tokens, logits = generate(model, ids, cache, **settings)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, expected)
    return cache
