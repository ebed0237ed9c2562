"""What a connector is to do, as vLLM's configuration and Cairn's have it together."""

from dataclasses import dataclass
from typing import Any

from cairn.config import Config


@dataclass(frozen=True, slots=True)
class Mode:
    """reads, writes: whether requests load and store. in_step: whether a step may load what it needs itself, layer by
    layer. events: whether the tiers' KV events are wanted. hands_over: whether prefill instances tell decode instances
    what they have stored.
    """

    reads: bool
    writes: bool
    in_step: bool
    events: bool
    hands_over: bool


def mode_of(vllm_config: Any, config: Config) -> Mode:
    """Roles and flags, of vLLM and of Cairn."""
    from vllm.platforms import current_platform

    transfer, told = vllm_config.kv_transfer_config, getattr(vllm_config, "kv_events_config", None)
    return Mode(
        reads=transfer.is_kv_consumer,
        writes=transfer.is_kv_producer and config.engine.enable_cache_upload,
        # On CUDA a layered load succeeds or the GPU is lost; elsewhere, and where a node may have taken the rows back,
        # it may fail, and then needs to be taken back.
        in_step=(current_platform.is_cuda_alike() and not config.node.address) or not steps_overlap(vllm_config),
        events=config.engine.enable_service_routing or bool(told and told.enable_kv_cache_events),
        hands_over=config.engine.enable_disagg_pd,
    )


def steps_overlap(vllm_config: Any) -> bool:
    """Whether vLLM begins a step before it knows the outcome of the one before (async scheduling, pipelines).

    Then it cannot take back a step whose load has failed: it accepts the next step's tokens all the same.
    """
    return bool(vllm_config.max_concurrent_batches > 1)
