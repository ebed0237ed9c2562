"""The scheduler's side: looks up, plans and holds what requests will load, and reserves and commits what they store."""

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from cairn.config import Config
from cairn.connect.vllm import handover
from cairn.connect.vllm.adapters import Adapters
from cairn.connect.vllm.blending import Blending, Missing, Settings, make_private
from cairn.connect.vllm.events import TierEvents
from cairn.connect.vllm.identity import extra_keys, namespace_of, reusable
from cairn.connect.vllm.messages import Copy, Done, Orders
from cairn.connect.vllm.mode import Mode
from cairn.connect.vllm.model import Served, own_arena
from cairn.connect.vllm.timed_steps import TimedSteps
from cairn.connect.vllm.tracked import Tracked
from cairn.connect.vllm.under_way import Load, Store, UnderWay
from cairn.engine.base import BlockStore
from cairn.engine.core import EngineCore
from cairn.engine.writing import Writing
from cairn.kv import KeyChain, as_tokens
from cairn.node.base import Home, VramHome
from cairn.observe.log import serving
from cairn.observe.metrics import Metrics
from cairn.observe.reasons import Reason
from cairn.observe.trace import joined
from cairn.plan import CostModel
from cairn.tier.arena import Arena

if TYPE_CHECKING:
    from cairn.engine.vram_orders import OrderedVramStore

logger = logging.getLogger(__name__)

#: Chunks that requests lacked are remembered until nobody runs; up to so many.
_MOST_LACKING: Final = 256

#: Fields of vLLM's output whose orders write to blocks before the forward pass.
_WRITES: Final = ("new_block_ids_to_zero", "kv_cache_block_copies")


class SchedulerSide:
    """Lives in vLLM's scheduler and owns the engine. Called by vLLM's scheduler loop alone.

    mode: what it is to do. blending: how to blend, if that is to be done. blocks: vLLM's pool of blocks, once it is
    known.
    """

    def __init__(self, served: Served, config: Config, mode: Mode, blending: Settings | None = None) -> None:
        self._served = served
        self._block = served.block_tokens
        arena = None if config.node.address else own_arena(served, config)
        Arena.unlink(served.name)  # all workers have it mapped by now
        self._vram: OrderedVramStore | None = None
        self.engine = EngineCore(
            served.namespace,
            config,
            arena=arena,
            layout=served.layout,
            canonical=served.canonical,
            open_store=partial(self._open_vram, config) if config.storage.vram.size else None,
        )
        self.engine.cost.recompute.step_tokens = served.step_tokens
        self.engine.cost.recompute.stages = served.stages
        if served.apart and (config.storage.remote.url or config.node.address):
            logger.warning(
                "engines of another kind or degree of parallelism do not share this one's blocks: %s", served.apart
            )
        self.events = TierEvents(self.engine.watch(), self._block) if mode.events else None
        self._mode = mode
        self._blending = Blending(self.engine, blending) if blending else None
        self._lacking: dict[bytes, Missing] = {}
        self._adapters = Adapters()
        self.blocks: Any = None
        self._tracked: dict[str, Tracked] = {}
        self._under_way = UnderWay(served.ranks)
        self._timed = TimedSteps(self._block)
        self._epoch = b""
        self._busy = False
        self._orders = Orders()

    # --- a request arrives ---------------------------------------------------------------------------------------

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind the first `computed` can be loaded, and whether the request waits for them outside of
        a step; (None, False): ask again, they are on their way up from a lower tier.
        """
        if not self._mode.reads or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        tracked = self._track(request)
        if tracked is None or not tracked.loads:
            return 0, False
        if tracked.loading:  # it was preempted before its load was reported, which still needs its stage
            return None, False
        if tracked.stage and tracked.stage.span.start != computed:
            self._drop_stage(tracked)
        if tracked.stage is None:
            with serving(request.request_id), joined(getattr(request, "trace_headers", None)):
                if self._awaits(tracked, computed) or not self._answered(tracked):
                    return None, False
                blends = self._vram and self._blending and tracked.blends and self._blending.chunked(request)
                tracked.stage = self.engine.stage(tracked.chain, first_token=computed, vram=not blends)
            self.engine.metrics.lookups.tick()
        if not tracked.stage.settled:
            return None, False
        tokens = max(0, tracked.stage.wait() - computed)  # waits no more, but notes a deadline that has passed
        with serving(request.request_id), joined(getattr(request, "trace_headers", None)):
            blended = self._blended(tracked, computed + tokens)
        if blended is None:
            return None, False
        if blended:
            tracked.layered = False
            return blended - computed, True
        if tokens == 0:
            self._drop_stage(tracked)
            return 0, False
        # A load from VRAM may turn out to have failed when it is over, and then needs to be taken back.
        able = self._mode.in_step and tracked.stage.tier == "dram"
        with serving(request.request_id), joined(getattr(request, "trace_headers", None)):
            tracked.layered = self.engine.autopilot.layerwise(tokens, able=able, alone=not self._busy)
        if tracked.layered:
            # After a full hit the last token is computed again, so that there are logits. (vLLM sees to it by itself
            # for requests that wait outside of a step.)
            tokens = min(tokens, request.num_tokens - 1 - computed)
        return tokens, tokens > 0 and not tracked.layered

    def allocated(self, request: Any, pages: list[int], tokens: int) -> None:
        """vLLM gave the request its blocks: orders the load of `tokens`, if any."""
        tracked = self._track(request)
        if tracked is None:
            return
        tracked.pages = list(pages)
        stage = tracked.stage
        if stage is None or tracked.loading:
            return
        if tokens == 0:
            self._drop_stage(tracked)
            return
        if tracked.chunks:
            number, computed = self._under_way.begin(Load(request.request_id)), tracked.chunks.stop - tokens
            tracked.loading.add(number)
            self._orders.blends.append(tracked.chunks.order(number, request.request_id, tracked.pages, computed))
            return
        first = stage.span.start // self._block
        for tier, home, rows in stage.rows(stage.span.start + tokens):
            number = self._under_way.begin(Load(request.request_id, tier, len(rows), home))
            tracked.loading.add(number)
            copy = _copy(number, tracked, rows, first, home)
            (self._orders.layered if tracked.layered else self._orders.loads).append(copy)
            first += len(rows)

    def sources(self, request: Any, tokens: int) -> dict[str, int]:
        """From which tiers the `tokens` of a request's load come."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.stage is None or tracked.chunks:
            return {}
        start = tracked.stage.span.start
        return tracked.stage.tokens_by_tier(start, start + tokens)

    # --- a step --------------------------------------------------------------------------------------------------

    def orders(self, output: Any) -> Orders:
        """What the workers shall do in the step that vLLM has just put together."""
        self._note_pages(output)
        scheduled = output.num_scheduled_tokens
        self._busy = len(scheduled) > 0
        for request_id in scheduled:
            tracked = self._running(request_id)
            if tracked:
                self._store(tracked)
        for tracked in [tracked for tracked in self._tracked.values() if tracked.held]:
            self._finish(tracked)
        orders, self._orders = self._orders, Orders()
        orders.settle_stores = bool(output.preempted_req_ids)
        orders.early = not any(getattr(output, writes, None) for writes in _WRITES)
        orders.forgiven = self._under_way.forgiven()
        if not orders.layered and not orders.blends:
            orders.work = self._timed.work(scheduled, self._computed)
        return orders

    def reported(self, done: Done) -> None:
        """Takes in what the workers have done."""
        if done.blends and self._blending:
            self._blending.ready = True
        if done.donation is not None and self._vram:
            self._vram.own = done.donation
        for number, copy, failed, seconds in self._under_way.ended(done):
            tracked = self._tracked[copy.request]
            if isinstance(copy, Load):
                tracked.loading.discard(number)
                self._loaded(tracked, copy, failed, seconds)
            else:
                self._stored(tracked, tracked.writings.pop(number), failed, seconds)
        if done.work:
            self.engine.cost.recompute.observe(done.work, done.work_seconds)

    def finished(self, request: Any) -> bool:
        """A request is over; True if its blocks are needed until they are stored."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.request is not request:
            return False
        tracked.finished = True
        tracked.computed = min(tracked.computed, request.num_computed_tokens)
        loading = bool(tracked.loading)
        if loading and not tracked.layered:
            return False  # vLLM keeps the blocks until the load is reported, and there is nothing new in them
        if not loading:
            self._drop_stage(tracked)
        # A load that a step under way follows: vLLM would not wait for it, nor for the stores of that step.
        tracked.held = loading or bool(tracked.writings) or self._to_store(tracked) > tracked.offered
        if all(other.finished for other in self._tracked.values()):
            tracked.held |= bool(self._lacking)
        if not tracked.held:
            del self._tracked[request.request_id]
        return tracked.held

    def handed_over(self, request: Any) -> dict[str, Any] | None:
        """What the instance that decodes a request is told, asked when the request is over here."""
        tracked = self._running(request.request_id)
        if not self._mode.hands_over or tracked is None or tracked.request is not request:
            return None
        if not handover.is_wanted(request):
            return None
        blocks = min(self._to_store(tracked), request.num_prompt_tokens // self._block)
        if blocks <= tracked.offered:  # else the rest is stored now, by `_finish`
            ends = [writing.first + len(writing.rows) for writing in tracked.writings.values()]
            blocks = min(blocks, max(ends) if ends else self.engine.held(tracked.chain))
        return handover.told(tracked.chain, blocks)

    def frees_blocks(self) -> bool:
        """Whether blocks of requests that are over become free by themselves, once they are stored."""
        return bool(self._orders.released) or any(tracked.held for tracked in self._tracked.values())

    # --- the connector itself ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets everything that was stored: from now on all keys are others.

        Requests that are at work keep their old keys, so they neither store nor load any more; loads under way end,
        as the steps under way do. Requests that only wait get new keys when vLLM asks about them again.
        """
        self._epoch = os.urandom(16)
        self._lacking.clear()
        if self.events:
            self.events.clear()
        for request_id, tracked in list(self._tracked.items()):
            if not tracked.loading:
                self._drop_stage(tracked)
            if not (tracked.pages or tracked.held):
                del self._tracked[request_id]
                continue
            tracked.offered, tracked.loads = 1 << 30, False

    def close(self) -> None:
        for tracked in self._tracked.values():
            self._drop_stage(tracked)
            for writing in tracked.writings.values():
                writing.end()
        self._tracked.clear()
        self.engine.close()

    # --- parts ---------------------------------------------------------------------------------------------------

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._tracked.get(request.request_id)
        if tracked:
            # An id may come again while the request that had it still waits for its last copy.
            return tracked if tracked.request is request else None
        adapter = self._adapters.identity(request.lora_request)
        if adapter is not None and reusable(request):
            namespace = namespace_of(self._served.namespace, request, self._epoch, adapter)
            extra = extra_keys(request, self._block)
            tokens = as_tokens(request.all_token_ids[:])
            chain = self.engine.chain(tokens, namespace=namespace, extra=extra)
            tracked = self._tracked[request.request_id] = Tracked(request, chain)
            if self._mode.hands_over:
                tracked.promise = handover.promise(request, chain, self.engine)
            if self.events:
                self.events.name(request, chain, 0, tokens)
        return tracked

    def _running(self, request_id: str) -> Tracked | None:
        """The request that vLLM means by this id in a step: not one that is over."""
        tracked = self._tracked.get(request_id)
        return tracked if tracked and not tracked.finished else None

    def _computed(self, request_id: str) -> int | None:
        """How many tokens of a request in a step have KV once that is over."""
        tracked = self._running(request_id)
        return tracked.computed if tracked else None

    def _awaits(self, tracked: Tracked, computed: int) -> bool:
        """Whether a prefill instance is still storing what the request will load. computed: tokens that vLLM has."""
        promise = tracked.promise
        if promise and promise.blocks * self._block > computed and promise.pending():
            return True
        tracked.promise = None
        return False

    def _answered(self, tracked: Tracked) -> bool:
        """Whether it is known what a remote store holds of the request, as far as it is waited for."""
        if not tracked.asked:
            tracked.asked, tracked.ask_until = True, self.engine.deadline(None)
            tracked.answer = self.engine.ask(tracked.chain)
        answer = tracked.answer
        return answer is None or answer.done() or time.monotonic() > tracked.ask_until

    def _drop_stage(self, tracked: Tracked) -> None:
        self._drop_chunks(tracked)
        if tracked.stage:
            tracked.stage.release()
            tracked.stage = None

    def _drop_chunks(self, tracked: Tracked) -> None:
        if tracked.chunks:
            tracked.chunks.release()
            tracked.chunks = None

    def _blended(self, tracked: Tracked, start: int) -> int | None:
        """Up to which token a request will be blended, of whose tokens the first `start` are at hand or held; 0: it
        will not be; None: its chunks are on their way up.
        """
        if not (self._blending and self._blending.ready and tracked.blends):
            return 0
        if tracked.stage and tracked.stage.tier != "dram":  # it was looked for before the worker had the model at hand
            return 0
        if tracked.chunks and tracked.chunks.start != start:
            self._drop_chunks(tracked)
        if tracked.chunks is None and tracked.stage:
            tracked.chunks = self._blending.find(tracked.request, tracked.chain, tracked.stage, start)
        if tracked.chunks and not tracked.chunks.settle():
            return None
        if tracked.chunks and self._mode.writes:
            for chunk in tracked.chunks.missing:
                if len(chunk.tokens) <= self._served.step_tokens and len(self._lacking) < _MOST_LACKING:
                    self._lacking[chunk.chain.key(-1)] = chunk
        if tracked.chunks is None or not self._blending.take(tracked.chunks):
            tracked.blends = False
            self._drop_chunks(tracked)
            return 0
        tracked.exact = min(tracked.exact, start // self._block)
        make_private(tracked.request, start // getattr(self.blocks, "hash_block_size", self._block))
        return tracked.chunks.stop

    def _open_vram(self, config: Config, metrics: Metrics, cost: CostModel) -> BlockStore:
        from cairn.engine.shared import open_ordered_vram

        served = self._served
        self._vram = open_ordered_vram(
            config, served.namespace.geometry, served.layout, metrics, cost, canonical=served.canonical
        )
        return self._vram

    def _note_pages(self, output: Any) -> None:
        """Follows where requests' blocks are, and how far they will be computed when the step is over."""
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            tracked = self._running(new.req_id)
            if tracked:
                tracked.scheduled(new.num_computed_tokens + scheduled[new.req_id], new.block_ids[0], anew=True)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            tracked = self._running(request_id)
            if tracked:
                pages = cached.new_block_ids[i]
                tracked.scheduled(
                    cached.num_computed_tokens[i] + scheduled[request_id],
                    pages[0] if pages else [],
                    anew=request_id in cached.resumed_req_ids,
                )

    def _to_store(self, tracked: Tracked) -> int:
        """How many of a request's blocks may be stored once the step is over."""
        return tracked.whole_blocks(self._block) if self._mode.writes else 0

    def _store(self, tracked: Tracked) -> None:
        """Orders the store of the blocks that have become whole, unless one is under way: then later, all at once."""
        blocks = self._to_store(tracked)
        if tracked.writings or blocks <= tracked.offered:
            return
        chain = tracked.chain
        if chain.tokens < tracked.request.num_tokens:
            self._extend(chain, tracked.request)
        given, tracked.offered = tracked.offered, blocks
        for writing in self._reserve(chain, given, blocks):
            number = self._under_way.begin(Store(tracked.request.request_id))
            tracked.writings[number] = writing
            self._orders.stores.append(_copy(number, tracked, writing.rows, writing.first, writing.home))

    def _reserve(self, chain: KeyChain, given: int, blocks: int) -> Iterator[Writing]:
        """Rows for what VRAM and DRAM lack: VRAM first, so that others find it there at once.

        The blocks of an answer come one at a time, and go to DRAM alone: a second call for each would cost the step
        more than VRAM spares the next turn.
        """
        if self._vram and (blocks - given > 1 or not given):
            in_vram = self._vram.write_vram(chain.keys[:blocks])
            if in_vram:
                yield in_vram
        in_dram = self.engine.reserve(chain, given, blocks)
        if in_dram:
            yield in_dram

    def _extend(self, chain: KeyChain, request: Any) -> None:
        """Takes in the tokens that came since."""
        blocks, known = len(chain), chain.tokens
        tokens = as_tokens(request.all_token_ids[blocks * self._block :])
        chain.extend(tokens[known - blocks * self._block :])
        if self.events:
            self.events.name(request, chain, blocks, tokens)

    def _loaded(self, tracked: Tracked, load: Load, failed: Reason | None, seconds: float) -> None:
        assert tracked.stage is not None
        if failed:
            tracked.loads = False
            if tracked.chunks:
                tracked.chunks.failed()
            if tracked.layered:
                self._forget_computed(tracked.pages[tracked.stage.span.start // self._block :])
            tracked.stage.failed(failed)
            self.engine.metrics.failures.add(1, tier=load.tier, reason=failed)
            if self._vram and isinstance(load.home, VramHome) and failed == Reason.IO_ERROR:
                self._vram.avoid(load.home.donation)
        elif tracked.chunks:
            if tracked.chunks.plan:
                self.engine.autopilot.blended(tracked.chunks.plan, seconds)
        else:
            size = load.blocks * self.engine.row_geometry.block_bytes
            self.engine.metrics.transferred(load.tier, "load", size, seconds)
            self.engine.cost.observe_load(load.tier, size, seconds)
            if tracked.layered:
                self.engine.layer_times.copied(range(self.engine.geometry.layers), seconds)
        if tracked.loading:
            return  # its stage holds what is still being copied
        self._drop_stage(tracked)
        if tracked.finished and not tracked.held and not tracked.writings:
            del self._tracked[tracked.request.request_id]

    def _forget_computed(self, pages: list[int]) -> None:
        """Pages that a step was computed with were not loaded: nothing behind them is anybody's KV.

        vLLM computes them again, but until it has, its own prefix cache offers them: to the next request, if this one
        is aborted, and to this one, if it is preempted. So they are taken out of it.
        """
        bad = set(pages)
        for tracked in self._tracked.values():
            first = next((i for i, page in enumerate(tracked.pages) if page in bad), None)
            if first is not None:
                tracked.computed = min(tracked.computed, first * self._block)
                if self.blocks is not None:
                    self.blocks.evict_blocks(set(tracked.pages[first:]))

    def _stored(self, tracked: Tracked, writing: Writing, failed: Reason | None, seconds: float) -> None:
        if failed:
            self.engine.metrics.failures.add(1, tier=writing.tier, reason=failed)
        else:
            size = len(writing.rows) * self.engine.row_geometry.block_bytes
            self.engine.metrics.transferred(writing.tier, "store", size, seconds)
            writing.commit(len(writing.rows))
        writing.end()
        if tracked.finished and not tracked.held and tracked.stage is None and not tracked.writings:
            del self._tracked[tracked.request.request_id]

    def _finish(self, tracked: Tracked) -> None:
        """Stores the rest of a request that is over, and then lets vLLM have its blocks."""
        if tracked.stage:
            return  # still loading
        self._store(tracked)
        if not tracked.writings and not self._busy:
            self._learn(tracked)
        if not tracked.writings:
            self._orders.released.add(tracked.request.request_id)
            del self._tracked[tracked.request.request_id]

    def _learn(self, tracked: Tracked) -> None:
        """Orders the next chunk that a request lacked to be computed alone: nobody waits for this step. So what is
        stored of a chunk depends on its own tokens only. tracked: a request that is over, for which vLLM still steps.
        """
        while self._lacking and not tracked.writings:
            chunk = self._lacking.pop(next(iter(self._lacking)))
            writing = self.engine.reserve(chunk.chain)
            if writing:
                number = self._under_way.begin(Store(tracked.request.request_id))
                tracked.writings[number] = writing
                self._orders.learns.append(chunk.learn(number, tracked.request.request_id, writing))


def _copy(number: int, tracked: Tracked, rows: Any, first: int, home: Home | VramHome | None) -> Copy:
    """Between rows and the request's blocks from `first` on."""
    pages = tracked.pages[first : first + len(rows)]
    return Copy(number, tracked.request.request_id, [int(row) for row in rows], pages, home)
