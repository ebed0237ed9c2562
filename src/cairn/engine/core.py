"""`EngineCore`: plan, transfer, commit. The synchronous and the layerwise face; `CacheEngine` adds the asynchronous
one.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from msgspec.structs import replace

from cairn.codec.quantized import quantizer_for
from cairn.config import Config
from cairn.copy import Copier, PagedKV, TokenSlots
from cairn.copy.cpu_quantized import cpu_copier
from cairn.engine.arguments import check_whole, like, mask_start, slot_array
from cairn.engine.base import BlockStore
from cairn.engine.figures import show_figures
from cairn.engine.layers import LayerStore
from cairn.engine.local import open_local
from cairn.engine.probe import Probes
from cairn.engine.rehearsal import rehearse
from cairn.engine.shared import open_node, open_vram
from cairn.engine.stage import COPY_BYTES, VRAM_COPY_BYTES, Span, Stage
from cairn.engine.writing import Writing
from cairn.errors import CairnError, ClosedError, GeometryError, InputError, StorageError
from cairn.index import POLICIES
from cairn.index.journal import JournalReader
from cairn.kv import CANONICAL, KeyChain, Layout, Namespace
from cairn.observe.decisions import record
from cairn.observe.layers import LayerTimes
from cairn.observe.log import log_once, setup_logging
from cairn.observe.metrics import Figures, Metrics
from cairn.observe.reasons import Reason
from cairn.observe.trace import begin, setup_tracing
from cairn.plan import Autopilot, CostModel, Segment
from cairn.tier.arena import Arena

if TYPE_CHECKING:
    from cairn.observe.http import PagesServer

logger = logging.getLogger(__name__)

#: A paged cache as a caller has it: a PagedKV, the tensors of the registered layout, or None for the registered cache.
KVCaches = PagedKV | Sequence[Any] | None

_WORKERS = 4
#: What a lookup may take beyond its own limit, until its thread has had its turn.
_SEEK_GRACE_S = 0.1
#: Who gives more time waits for a day: a node takes no longer deadlines, locks and futures none for ever.
_LONGEST_S = 86_400.0


class Stored(NamedTuple):
    """What a store did: `new` tokens became resident; tokens up to `upto` are."""

    new: int
    upto: int


class EngineCore:
    """Keeps the KV blocks of one model (or one shard of it) beyond the engine's own cache.

    Tokens may be given as an array [n], a sequence, a CPU tensor, or a `KeyChain` (from `chain`), which spares the
    hashing when a request asks several times. `namespace` stands in for the engine's own in one call (another tenant,
    another LoRA); its geometry must be the engine's. `timeout` is in seconds, the configured deadline unless given.

    All methods are thread-safe. They raise InputError for arguments that break their contract and ClosedError after
    `close`; whatever goes wrong inside is a counted miss (`get_stats`). The engine owns its tiers; KV tensors stay the
    caller's, who must leave the slots of a call alone until it returns. `arena`: memory for the DRAM tier that other
    processes map too (`cairn.tier.arena`), for connectors whose workers copy by themselves. `node`: the address of the
    host's node (else `node.address`), which then keeps the blocks instead of this process. `layout`: of the rows, for
    connectors that do not write canonical ones. canonical: whether codecs can read the rows' values; what the namespace
    and the layout say unless given. With `storage.cpu.codec` rows are quantized: neither matters then, and their
    geometry is `row_geometry`. open_store: makes the store, in the place of what the configuration says.
    """

    def __init__(
        self,
        namespace: Namespace,
        config: Config | None = None,
        *,
        arena: Arena | None = None,
        node: str | None = None,
        layout: Layout = CANONICAL,
        canonical: bool | None = None,
        open_store: Callable[[Metrics, CostModel], BlockStore] | None = None,
    ) -> None:
        self.namespace = namespace
        self.config = config or Config()
        self.geometry = self.row_geometry = namespace.geometry
        self._quantizer = quantizer_for(self.geometry, self.config.storage.cpu.codec)
        said = namespace.layout == "canonical" and layout == CANONICAL
        self._canonical = said if canonical is None else canonical
        if self._quantizer:
            # To whatever holds them, quantized rows are bytes.
            self.row_geometry, layout, self._canonical = self._quantizer.stored, CANONICAL, False
        setup_logging(self.config.engine.log_level, self.config.observe.log_format)
        setup_tracing(self.config.observe, "cairn-engine")
        for policy in {self.config.storage.cpu.policy, self.config.storage.disk.policy}:
            rehearse(POLICIES[policy])
        self.metrics = Metrics()
        g = self.geometry
        shape = f"{g.layers} layers, {g.planes}x{g.kv_heads}x{g.head_dim} {g.dtype}"
        self.metrics.identity.add(1, 1, model=namespace.model, revision=namespace.revision, geometry=shape)
        self.layer_times = LayerTimes(self.geometry.layers, self.metrics.layerwise)
        self.cost = CostModel()
        self.autopilot = Autopilot(
            self.config.autopilot,
            self.cost,
            self.row_geometry.token_bytes,
            lambda one: record(
                self.metrics, *one[:3], tokens=one.tokens, expected_s=one.expected_s, instead_s=one.instead_s
            ),
            measures=self.config.engine.planner,
        )
        self._store, self._copier = self._opened(node or self.config.node.address, layout, arena, open_store)
        self._probes = Probes(self._store, self.row_geometry.block_bytes)
        self._layers = ThreadPoolExecutor(_WORKERS, "cairn-layers")
        self._root = self._own(namespace).digest()
        self._kv: PagedKV | None = None
        self._layout = "nhd"
        self._closed = threading.Event()
        self._figures: PagesServer | None = None
        if self.config.observe.http_port is not None:
            try:
                self._figures = show_figures(self.config.observe, self.metrics, self.layer_times)
            except CairnError:
                EngineCore.close(self)  # not what a subclass has not made yet
                raise

    def _opened(
        self,
        address: str | None,
        layout: Layout,
        arena: Arena | None,
        open_store: Callable[[Metrics, CostModel], BlockStore] | None,
    ) -> tuple[BlockStore, Copier]:
        """The store that is asked for, and what copies between it and the paged cache."""
        config, canonical = self.config, self._canonical
        if config.storage.vram.size and not open_store:
            return open_vram(address, config, self.geometry, layout, self.metrics, self.cost, canonical=canonical)
        copier = cpu_copier(self.geometry, self._quantizer, config.engine.copy_threads)
        if open_store:
            return open_store(self.metrics, self.cost), copier
        rows, metrics, cost = self.row_geometry, self.metrics, self.cost
        if address:
            return open_node(address, config, rows, layout, metrics, cost, canonical=canonical), copier
        worth = self.autopilot.write
        return open_local(config, rows, layout, metrics, cost, arena, canonical=canonical, worth=worth), copier

    # --- what a request asks -------------------------------------------------------------------------------------

    def register_kv_caches(self, kvcaches: PagedKV | Sequence[Any], layout: str = "nhd") -> PagedKV:
        """Names the paged cache that calls without `kvcaches` mean; see `PagedKV.from_tensors` for layouts."""
        self._layout = layout
        self._kv = self._paged(kvcaches)
        self._copier.prepare(self._kv, direct=self.config.storage.vram.size > 0)
        return self._kv

    def chain(
        self, tokens: Any = (), *, namespace: Namespace | None = None, extra: Mapping[int, bytes] | None = None
    ) -> KeyChain:
        """The key chain of one request: hashed once, extended as tokens come. `extra`: see `KeyChain`."""
        return KeyChain(self._digest(namespace), self.geometry.block_tokens, tokens, extra)

    def lookup(self, tokens: Any, *, namespace: Namespace | None = None) -> int:
        """How many leading tokens (whole blocks) any tier holds. Moves nothing and promises nothing; a remote store is
        asked first, for as long as a lookup may take."""
        chain = self._chain(tokens, namespace)
        self.metrics.lookups.tick()
        self.seek(chain)
        return self._store.match(chain.keys).total * self.geometry.block_tokens

    def contains(self, key: bytes) -> int:
        """Where a block (16-byte key, see `KeyChain.key`) is: 0 in VRAM, 1 elsewhere, -1 nowhere."""
        self._check_open()
        if len(key) != 16:
            raise InputError(f"key of {len(key)} bytes: a block key has 16")
        held = self._store.match(np.frombuffer(key, np.uint64).reshape(1, 2))
        return 0 if held.vram else 1 if held.total else -1

    def store(
        self,
        tokens: Any,
        mask: Any = None,
        kvcaches: KVCaches = None,
        slot_mapping: Any = None,
        offset: int = 0,
        *,
        namespace: Namespace | None = None,
        timeout: float | None = None,
    ) -> int:
        """Stores the whole blocks of a prompt that DRAM does not hold; returns how many tokens became resident.

        mask: bool [n], False for leading tokens that need no storing. slot_mapping: integers [n - offset], where token
        offset + i stands in the paged cache. An unfinished block is left for later. Lower tiers follow behind.
        """
        chain = self._chain(tokens, namespace)
        kv = self._paged(kvcaches)
        slots = slot_array(slot_mapping, chain.tokens, offset)
        start = max(mask_start(mask, chain.tokens), offset)
        with begin("cairn.store", prompt_tokens=chain.tokens) as storing:
            stored = self._store_from(chain, start, kv, slots[start - offset :], self.deadline(timeout))
            storing.note(stored_tokens=stored.new)
        return stored.new

    def retrieve(
        self,
        tokens: Any,
        mask: Any = None,
        kvcaches: KVCaches = None,
        slot_mapping: Any = None,
        offset: int = 0,
        *,
        namespace: Namespace | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Loads the held blocks of a prompt into the paged cache; returns bool [n], True for every token loaded.

        mask: bool [n], False for leading tokens that the caller has; their slots are not written. What is not True has
        to be computed. The result is a torch.BoolTensor if `tokens` is a tensor, else a numpy array.
        """
        chain = self._chain(tokens, namespace)
        kv = self._paged(kvcaches)
        slots = slot_array(slot_mapping, chain.tokens, offset)
        start = max(mask_start(mask, chain.tokens), offset)
        self.seek(chain, timeout=timeout)
        with self.stage(chain, first_token=start, timeout=timeout, briefly=True) as stage:
            loaded = stage.copy_to(kv, slots[start - offset :])
        result = np.zeros(chain.tokens, np.bool_)
        result[start:loaded] = True
        return like(tokens, result)

    # --- in steps: ask, stage, layer by layer -------------------------------------------------------------------------

    def ask(self, chain: KeyChain, *, timeout: float | None = None) -> "Future[None] | None":
        """Begins to find out what a remote store holds of a prompt; None if that is known, or not worth the time.

        Whoever plans a load (`stage`) when the future is done, or when he will not wait for it any longer, plans with
        all that is known by then. Waits for nothing.
        """
        self._check_open()
        if not self._store.asks or self.config.autopilot.load == "never":
            return None
        worth_s = self.recompute_s(chain)
        asking = begin("cairn.lookup", blocks=len(chain), worth_s=worth_s)
        answer = self._store.ask(chain.keys, deadline=self.deadline(timeout), worth_s=worth_s)
        if answer is None or not asking.on:
            asking.end()
        else:
            answer.add_done_callback(lambda _: asking.end())
        return answer

    def held(self, chain: KeyChain) -> int:
        """How many leading blocks any tier is known to hold. Moves nothing and asks no remote store."""
        self._check_open()
        return self._store.match(chain.keys).total

    def recompute_s(self, chain: KeyChain) -> float:
        """Seconds that computing the blocks which no tier is known to hold takes; inf: not known, or not minded."""
        rest = (len(chain) - self.held(chain)) * self.geometry.block_tokens
        known = self.cost.recompute.knows(rest, chain.tokens - rest) and self.config.engine.planner
        return self.cost.recompute.seconds(rest, chain.tokens - rest) if known else math.inf

    def seek(self, chain: KeyChain, *, timeout: float | None = None) -> None:
        """As `ask`, and waits until it is known, within the time that a lookup may take."""
        answer = self.ask(chain, timeout=timeout)
        if answer is not None:
            limit = self.config.storage.remote.lookup_timeout_s + _SEEK_GRACE_S
            wait([answer], min(limit, self.config.engine.timeout_s if timeout is None else timeout))

    def stage(
        self,
        chain: KeyChain,
        *,
        first_token: int = 0,
        stop_block: int | None = None,
        timeout: float | None = None,
        vram: bool = True,
        briefly: bool = False,
    ) -> Stage:
        """Plans a prompt's load and starts it: pins what DRAM holds, brings up what lower tiers are known to hold (see
        `ask`). Returns at once.

        first_token: tokens before it the caller has. stop_block: blocks from there on are not wanted. vram: False: what
        VRAM has is not there, for who reads DRAM alone. briefly: see `BlockStore.find`. The stage must be released (use
        it as a context manager); `wait` on it for blocks that are on their way.
        """
        self._check_open()
        keys, deadline = chain.keys[:stop_block], self.deadline(timeout)
        loading = begin("cairn.load", prompt_tokens=chain.tokens, first_token=first_token)
        block, start = self.geometry.block_tokens, min(first_token, len(keys) * self.geometry.block_tokens)
        held, hold = (
            self._store.find(keys, briefly=briefly) if vram else (self._store.match(keys)._replace(vram=0), None)
        )
        total, done = max(start, held.total * block), start
        segments = []
        for tier, blocks in (("vram", held.vram), ("dram", held.dram), *held.below):
            upto = max(done, blocks * block)
            segments.append(Segment(tier, upto - done))
            done = upto
        wanted = self.autopilot.load(segments, chain.tokens, start=start).tokens
        pinned = self.config.autopilot.load == "never"
        if start + wanted <= held.dram * block and not pinned:
            self._probes.look(keys, held, deadline)
        if hold is None or total > start + wanted:
            if hold:
                hold.release()  # it is dearer to load than to compute
            bring = self._store.hold if vram else self._store.hold_dram
            hold = bring(keys[: (start + wanted) // block], deadline=deadline)
        declined_as = Reason.PINNED if pinned else Reason.CHEAPER_TO_RECOMPUTE
        span = Span(start, len(keys) * block, chain.tokens, total - start - wanted, declined_as)
        loading.note(held_tokens=total, planned_tokens=start + wanted)
        return Stage(
            hold,
            self._copier,
            self._layers,
            self.metrics,
            self.cost,
            span,
            deadline,
            times=self.layer_times,
            traced=loading,
        )

    def reserve(self, chain: KeyChain, first_block: int = 0, stop_block: int | None = None) -> Writing | None:
        """Rows for the blocks of a chain that DRAM lacks, to be filled, committed and ended by the caller.

        None if it lacks none, has no room, or lacks some before `first_block`, which are not at hand.
        """
        self._check_open()
        keys = chain.keys[:stop_block]
        if not self.autopilot.stores:
            self._skipped(len(keys) - first_block, Reason.PINNED)
            return None
        writing = self._store.write(keys, namespace=chain.namespace)
        lacking = len(keys) - writing.first
        if lacking and writing.first < first_block:
            self._skipped(len(keys) - first_block, Reason.NO_PARENT)
        else:
            self._skipped(lacking - len(writing.rows), writing.reason)
            if len(writing.rows):
                return writing
        writing.end()
        return None

    def store_layers(self, chain: KeyChain, first_block: int = 0, stop_block: int | None = None) -> LayerStore | None:
        """Rows for the blocks of a chain that DRAM does not hold, to be put layer by layer; None if there is nothing to
        do.

        Blocks before `first_block` are not at hand. The result's `first_block` and `blocks` say which blocks it takes.
        """
        self._check_open()
        writing = self.reserve(chain, first_block, stop_block)
        return LayerStore(writing, self._copier, self._skipped) if writing else None

    def observe_prefill(self, tokens: int, context: int, seconds: float) -> None:
        """Tells the planner what computing `tokens` behind `context` others took."""
        recompute = self.cost.recompute
        recompute.observe(recompute.work(tokens, context), seconds)

    # --- the engine itself ---------------------------------------------------------------------------------------

    def get_stats(self) -> Figures:
        """Everything counted so far, by name; see docs/architecture.md for the reasons of misses."""
        return self.metrics.snapshot()

    def watch(self) -> Mapping[str, JournalReader]:
        """A journal a tier of what becomes findable and what goes, by the tier's name, for one reader."""
        self._check_open()
        return self._store.watch()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until what is stored is durable on disk, as far as it was admitted; False if it was not in time."""
        self._check_open()
        return self._store.flush(max(0.0, self.deadline(timeout) - time.monotonic()))

    def close(self, timeout: float | None = None) -> None:
        """Flushes within `timeout` and gives every resource back. Idempotent."""
        if self._closed.is_set():
            return
        deadline = self.deadline(timeout)
        self._closed.set()
        if self._figures:
            self._figures.close()
        self._layers.shutdown(wait=True)
        self._store.close(max(0.0, deadline - time.monotonic()))
        self._copier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def deadline(self, timeout: float | None) -> float:
        """The moment (time.monotonic) by which a call that begins now must end. Raises InputError for no number."""
        seconds = self.config.engine.timeout_s if timeout is None else timeout
        if math.isnan(seconds):
            raise InputError(f"timeout={timeout}: must be a number of seconds")
        return time.monotonic() + min(seconds, _LONGEST_S)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _store_from(
        self,
        chain: KeyChain,
        start: int,
        kv: PagedKV,
        slots: TokenSlots,
        deadline: float,
        cancel: threading.Event | None = None,
    ) -> Stored:
        """Stores the whole blocks from token `start` on that DRAM lacks; slots[i] is the slot of token start + i."""
        block = self.geometry.block_tokens
        writing = self.reserve(chain, -(-start // block))
        if writing is None:
            held = self._store.match(chain.keys)
            return Stored(0, max(held.dram, held.stored) * block)
        most = VRAM_COPY_BYTES if writing.tier == "vram" else COPY_BYTES
        step = max(1, most // self.row_geometry.block_bytes)
        first, rows = writing.first, writing.rows
        new = done = 0
        reason = Reason.TIMEOUT
        try:
            check_whole(slots[first * block - start : (first + len(rows)) * block - start])
            while done < len(rows) and not (done and time.monotonic() > deadline) and not (cancel and cancel.is_set()):
                piece = rows[done : done + step]
                place = (first + done) * block - start
                started = time.monotonic()
                with writing.access() as memory:
                    if memory is None:
                        reason = Reason.NODE_AWAY
                        break
                    self._copier.gather(kv, slots[place : place + len(piece) * block], memory, piece)
                size = len(piece) * self.row_geometry.block_bytes
                self.metrics.transferred(writing.tier, "store", size, time.monotonic() - started)
                new += writing.commit(len(piece))
                if writing.lost:
                    reason = Reason.NODE_AWAY
                    break
                done += len(piece)
        except StorageError as error:
            log_once(logger, "gather", f"a copy failed: {error}")
            reason = Reason.IO_ERROR
        finally:
            writing.end()
        self._skipped(len(rows) - done, reason)
        return Stored(new * block, (first + done) * block)

    def _skipped(self, blocks: int, reason: Reason) -> None:
        if blocks > 0:
            self.metrics.skipped_tokens.add(blocks * self.geometry.block_tokens, tier="dram", reason=reason)

    def _chain(self, tokens: Any, namespace: Namespace | None) -> KeyChain:
        self._check_open()
        if not isinstance(tokens, KeyChain):
            return self.chain(tokens, namespace=namespace)
        if tokens.block_tokens != self.geometry.block_tokens:
            raise InputError(
                f"chain of {tokens.block_tokens}-token blocks: the engine's have {self.geometry.block_tokens}"
            )
        return tokens

    def _digest(self, namespace: Namespace | None) -> bytes:
        self._check_open()
        namespace = namespace or self.namespace
        if namespace.geometry != self.geometry:
            raise GeometryError(f"namespace {namespace!r}: its geometry must be the engine's, {self.geometry}")
        return self._root if namespace == self.namespace else self._own(namespace).digest()

    def _own(self, namespace: Namespace) -> Namespace:
        """A namespace for this engine's rows: those of another form are other blocks."""
        if self._quantizer is None:
            return namespace
        return replace(namespace, layout=f"{self._quantizer.layout}:{namespace.layout}")

    def _paged(self, kvcaches: KVCaches) -> PagedKV:
        if isinstance(kvcaches, PagedKV):
            return kvcaches
        if kvcaches is not None:
            return PagedKV.from_tensors(kvcaches, self._layout, self.geometry)
        if self._kv is None:
            raise InputError("kvcaches is missing: pass it or call register_kv_caches first")
        return self._kv

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise ClosedError("the engine was closed")
