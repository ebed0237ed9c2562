"""What `served_model` makes of vLLM's configurations; engines that run tell the rest."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.config import Config, load_config
from cairn.connect.vllm.model import Served, served_model
from cairn.errors import GeometryError


def configured(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    transfer = {"kv_connector": "CairnConnector", "kv_connector_module_path": "cairn.connect.vllm"}
    options["kv_transfer_config"] = {**transfer, "kv_role": "kv_both", "engine_id": "the same"}
    return EngineArgs(model=str(model), dtype="float32", skip_tokenizer_init=True, **options).create_engine_config()


def served(vllm_config: Any, config: Config | None = None, **spec: Any) -> Served:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    layers = [f"model.layers.{i}.self_attn.attn" for i in range(5)]
    full = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, **spec)
    caches = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, full)])
    return served_model(vllm_config, caches, config or load_config(environ={}))


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_pooling_over_a_prompts_first_tokens_is_refused(tiny: Path, pooling: str) -> None:
    """vLLM ends an engine whose request comes to it with some of them computed."""
    with pytest.raises(GeometryError, match="it pools over"):
        served(configured(tiny, runner="pooling", pooler_config={"seq_pooling_type": pooling}))


def test_attention_to_later_tokens_is_refused(tiny: Path) -> None:
    """A prefix language model's, for which vLLM switches its own prefix cache off."""
    with pytest.raises(GeometryError, match="attend to later ones"):
        served(configured(tiny), non_causal=True)


def test_weights_that_are_streamed_are_known_by_their_name_alone(tiny: Path, tmp_path: Path) -> None:
    """vLLM keeps a model's config in a directory, and its weights in the object store, where they may change."""
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    here, streamed = configured(tiny), configured(tmp_path)
    assert served(here).namespace == served(here).namespace
    assert served(streamed).namespace != served(streamed).namespace
    named = load_config(environ={}, overrides={"engine.model_revision": "step 100"})
    assert served(streamed, named).namespace == served(streamed, named).namespace


def test_engines_of_one_engine_id_share_no_arena(tiny: Path) -> None:
    """Replicas of one command line may start in the same moment, on one host."""
    one, other = configured(tiny), configured(tiny)
    assert served(one).name == served(pickle.loads(pickle.dumps(one))).name  # a worker's
    assert served(one).name != served(other).name
