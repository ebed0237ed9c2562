"""What a vLLM model is to Cairn: which ones it can serve, the shape of their blocks, and what tells their KV apart."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from msgspec.structs import replace

from cairn.codec.quantized import Quantizer, quantizer_for
from cairn.config import Config
from cairn.connect.vllm.layout import layout_of
from cairn.errors import GeometryError
from cairn.kv import CANONICAL, KVGeometry, Layout, Namespace
from cairn.kv.geometry import refuse_stateful
from cairn.observe.log import log_once
from cairn.tier.arena import Arena
from cairn.tier.dram import arena_shape

logger = logging.getLogger(__name__)

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


@dataclass(frozen=True)
class Served:
    """A model as one vLLM engine runs it.

    shards: the geometry of each rank's blocks, by global rank: pipeline stages one behind the other, and within a stage
    the tensor-parallel ranks. They differ only in their layers. stages: how many pipeline stages there are. name: of
    the arena that the engine's processes share. namespace: of requests without LoRA and salt; its geometry is that of
    all ranks together. layout: of the blocks, and of the rows unless these are quantized. apart: why only engines of
    the same kind and degree of parallelism share its blocks; empty if others do, too. step_tokens: how many tokens a
    step computes at most. canonical: whether codecs can read the rows' values: with one rank a stage, except on a
    CPU, whose pages have an order of their own. codec: that the rows are quantized by, or none.
    """

    shards: tuple[KVGeometry, ...]
    stages: int
    name: str
    namespace: Namespace
    layout: Layout
    apart: str
    step_tokens: int
    canonical: bool
    codec: str

    @property
    def ranks(self) -> int:
        return len(self.shards)

    @property
    def block_tokens(self) -> int:
        return self.namespace.geometry.block_tokens

    def part(self, rank: int) -> slice:
        """Where a rank's shard lies in a row of the arena, in bytes: shards stand one behind the other."""
        sizes = [self._stored(shard).block_bytes for shard in self.shards[: rank + 1]]
        return slice(sum(sizes[:-1]), sum(sizes))

    @property
    def row_geometry(self) -> KVGeometry:
        """Of all ranks together, as the arena holds it."""
        return self._stored(self.namespace.geometry)

    @property
    def row_layout(self) -> Layout:
        return self.layout if self.codec == "none" else CANONICAL

    def quantizer(self, rank: int) -> Quantizer | None:
        """Of a rank's shard."""
        return quantizer_for(self.shards[rank], self.codec)

    def _stored(self, geometry: KVGeometry) -> KVGeometry:
        quantizer = quantizer_for(geometry, self.codec)
        return quantizer.stored if quantizer else geometry


def served_model(vllm_config: Any, kv_cache_config: Any, config: Config) -> Served:
    """Reads vLLM's configuration. config: Cairn's.

    Raises GeometryError, with the reason, for a model that Cairn would get wrong.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    _refuse(vllm_config, kv_cache_config)
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    own = KVGeometry(
        layers=len(group.layer_names),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=_dtype(vllm_config, spec),
        block_tokens=spec.block_size,
        planes=1 if type(spec).__name__ == "MLAAttentionSpec" else 2,
    )
    layers = stage_layers(model, parallel, own.layers)
    ranks = parallel.tensor_parallel_size
    shards = tuple(replace(own, layers=count) for count in layers for _ in range(ranks))
    whole = replace(own, layers=sum(layers), kv_heads=own.kv_heads * ranks)
    page = f"{_platform()}:{_layout(vllm_config, kv_cache_config)}"
    codec = config.storage.cpu.codec
    layout, named, apart = CANONICAL, "canonical", ""
    try:
        layout = layout_of(vllm_config, shards, len(layers), whole, page)
        if codec != "none" and ranks > 1:
            apart = "quantized rows keep the order of their ranks"
    except GeometryError as error:
        apart = str(error)
    if apart:
        # With one rank a stage a row is the layers in their order, wherever they are cut.
        cuts = layers if ranks > 1 else [whole.layers]
        named = f"vllm:{page}:tp{ranks}:pp{'+'.join(map(str, cuts))}"
    served_name = model.served_model_name if isinstance(model.served_model_name, str) else model.model
    namespace = Namespace(
        model=config.engine.model_name or served_name,
        geometry=whole,
        revision=_named_revision(vllm_config, config.engine.model_revision) or _revision(vllm_config),
        layout=named,
    )
    # An engine's id may be the operator's, and that of several.
    engine = f"{vllm_config.instance_id} {vllm_config.kv_transfer_config.engine_id}"
    name = hashlib.blake2s(engine.encode(), digest_size=12).hexdigest()
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    canonical = ranks == 1 and _platform() != "cpu"
    return Served(shards, len(layers), name, namespace, layout, apart, step_tokens, canonical, codec)


def own_arena(served: Served, config: Config) -> Arena:
    """The arena that an engine's processes share where no node keeps the blocks. Raises StorageError."""
    slots, stride = arena_shape(served.row_geometry.block_bytes, config.storage.cpu.size)
    return Arena.shared(served.name, slots, stride)


def stage_layers(model: Any, parallel: Any, own: int) -> list[int]:
    """How many layers with KV each pipeline stage has. own: how many vLLM has given this process.

    vLLM tells a process of its own stage only (the scheduler of the first), so the others follow from the rule by which
    vLLM cuts models. Raises GeometryError where the rule does not give what vLLM did.
    """
    from vllm.distributed.utils import get_pp_indices

    stages = parallel.pipeline_parallel_size
    if stages == 1:
        return [own]
    total = model.get_total_num_hidden_layers()
    cuts = [get_pp_indices(total, stage, stages) for stage in range(stages)]
    layers = [stop - start for start, stop in cuts]
    stage = parallel.rank // parallel.tensor_parallel_size % stages
    if layers[stage] != own:
        raise GeometryError(
            f"{model.model}: pipeline stage {stage} has {own} layers with KV, {layers[stage]} expected: "
            "its stages cannot be told apart; serve this model with pipeline_parallel_size=1 or without CairnConnector"
        )
    return layers


def _layout(vllm_config: Any, kv_cache_config: Any) -> str:
    """The order of dimensions inside a page, as far as vLLM names it: since 0.32 in the config, once by a function,
    which asks for the current config; the scheduler has none where workers are other processes.
    """
    named = getattr(kv_cache_config, "kv_cache_layout", None)
    if named:
        return str(named)
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends import utils

    ask = getattr(utils, "get_kv_cache_layout", None)
    if ask is None:
        return "default"
    with set_current_vllm_config(vllm_config):
        return str(ask())


def _platform() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _refuse(vllm_config: Any, kv_cache_config: Any) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = model.model
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    reasons = {
        f"its KV cache has groups of {', '.join(kinds)}, which forget or fold tokens": (
            len(groups) != 1 or kinds[0] not in ("FullAttentionSpec", "MLAAttentionSpec")
        ),
        "it has an encoder": model.is_encoder_decoder,
        "its tokens attend to later ones": any(getattr(group.kv_cache_spec, "non_causal", False) for group in groups),
        "it pools over what stands at the beginning of a prompt, too": (
            not getattr(model, "is_prefix_caching_supported", True)
        ),
        "its ranks are on several hosts, which needs a remote tier": getattr(parallel, "nnodes", 1) > 1,
        "decode context parallelism splits blocks between ranks": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
        ),
        "prefill context parallelism splits prompts between ranks": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise GeometryError(f"{name}: {reason}; serve this model without CairnConnector")
    spec = groups[0].kv_cache_spec
    for attribute in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, attribute, None):
            raise GeometryError(
                f"{name}: {attribute}={getattr(spec, attribute)}: its layers drop tokens; "
                "serve this model without CairnConnector"
            )
    refuse_stateful(model.hf_text_config)


def _dtype(vllm_config: Any, spec: Any) -> str:
    name = str(spec.dtype).removeprefix("torch.")
    cache = vllm_config.cache_config.cache_dtype
    if name == "uint8" or cache.startswith("fp8"):
        return "float8_e5m2" if "e5m2" in cache else "float8_e4m3"
    return {"float8_e4m3fn": "float8_e4m3"}.get(name, name)


def _named_revision(vllm_config: Any, given: str | None) -> str | None:
    """The operator's name for the weights, and whatever vLLM was told to make of them; None if there is no name."""
    model = vllm_config.model_config
    changes = {
        "quantization": model.quantization,
        "draft": _draft(vllm_config),
        "overrides": bool(model.hf_overrides) and _settings(model),
    }
    made = [f"{kind}={change}" for kind, change in changes.items() if change]
    return given and " ".join([given, *made])


def _settings(model: Any) -> str:
    """The model's config as vLLM resolved it."""
    return json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)


def _revision(vllm_config: Any) -> str:
    """A digest of all that the model's KV depends on: weights, their quantization, the config as vLLM resolved it."""
    model = vllm_config.model_config
    parts = [
        _settings(model),
        str(model.dtype),
        str(model.quantization),
        vllm_config.cache_config.cache_dtype,
        _draft(vllm_config),
        _weights(vllm_config),
    ]
    return f"xxh3:{xxhash.xxh3_128(chr(0).join(parts).encode()).hexdigest()}"


def _draft(vllm_config: Any) -> str:
    """What guesses: a draft model may have layers of its own among the model's."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return f"{speculative.method}:{speculative.model}" if speculative else ""


def _weights(vllm_config: Any) -> str:
    """What tells these weights from others: the hub's commit, or the files' names, sizes, times and a sample of them.

    Files are not read whole: 64 samples each find any training, and the time of change any edit in place. Weights that
    are streamed from elsewhere (an object store) are nobody else's: what is there may be others tomorrow.
    """
    model, load_format = vllm_config.model_config, str(vllm_config.load_config.load_format)
    if "dummy" in load_format:
        return f"dummy:{model.seed}"
    commit = getattr(model.hf_config, "_commit_hash", None)
    home = Path(model.model)
    if not home.is_dir():
        return f"{model.model}@{commit or model.revision}"
    files = sorted(path for pattern in _WEIGHTS for path in home.glob(pattern))
    if not files or getattr(model, "model_weights", False):
        log_once(
            logger,
            "weights",
            f"{model.model}: its weights are not in this directory, so that nobody can tell them from others: this "
            "engine's blocks are found by itself alone; name the weights by engine.model_revision",
        )
        return f"streamed:{os.urandom(16).hex()}"
    digest = xxhash.xxh3_128()
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        with file.open("rb") as weights:
            for at in range(0, status.st_size, max(_SAMPLE_BYTES, status.st_size // _SAMPLES)):
                weights.seek(at)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()
