"""`EngineCore`: plan, transfer, commit. The synchronous and the layerwise face; `CacheEngine` adds the asynchronous
one.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from cairn.config import Config
from cairn.copy import CpuCopier, PagedKV, TokenSlots
from cairn.engine.arguments import like, mask_start, slot_array
from cairn.engine.base import BlockStore
from cairn.engine.layers import LayerStore
from cairn.engine.local import open_local
from cairn.engine.stage import COPY_BYTES, Span, Stage
from cairn.engine.writing import Writing
from cairn.errors import ClosedError, GeometryError, InputError
from cairn.kv import KeyChain, Namespace
from cairn.observe.log import setup_logging
from cairn.observe.metrics import Figures, Metrics
from cairn.observe.reasons import Reason
from cairn.plan import CostModel, Segment, plan_load

#: A paged cache as a caller has it: a PagedKV, the tensors of the registered layout, or None for the registered cache.
KVCaches = PagedKV | Sequence[Any] | None

_WORKERS = 4


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
    caller's, who must leave the slots of a call alone until it returns.
    """

    def __init__(self, namespace: Namespace, config: Config | None = None) -> None:
        self.namespace = namespace
        self.geometry = namespace.geometry
        self.config = config or Config()
        setup_logging(self.config.engine.log_level)
        self.metrics = Metrics()
        self.cost = CostModel()
        self._store: BlockStore = open_local(self.config, self.geometry, self.metrics, self.cost)
        self._copier = CpuCopier(self.geometry, self.config.engine.copy_threads)
        self._layers = ThreadPoolExecutor(_WORKERS, "cairn-layers")
        self._root = namespace.digest()
        self._kv: PagedKV | None = None
        self._layout = "nhd"
        self._closed = threading.Event()

    # --- what a request asks -------------------------------------------------------------------------------------

    def register_kv_caches(self, kvcaches: PagedKV | Sequence[Any], layout: str = "nhd") -> PagedKV:
        """Names the paged cache that calls without `kvcaches` mean; see `PagedKV.from_tensors` for layouts."""
        self._layout = layout
        self._kv = self._paged(kvcaches)
        return self._kv

    def chain(
        self, tokens: Any = (), *, namespace: Namespace | None = None, extra: Mapping[int, bytes] | None = None
    ) -> KeyChain:
        """The key chain of one request: hashed once, extended as tokens come. `extra`: see `KeyChain`."""
        return KeyChain(self._digest(namespace), self.geometry.block_tokens, tokens, extra)

    def lookup(self, tokens: Any, *, namespace: Namespace | None = None) -> int:
        """How many leading tokens (whole blocks) any tier holds. Moves nothing and promises nothing."""
        chain = self._chain(tokens, namespace)
        self.metrics.lookups.add()
        return self._store.match(chain.keys).total * self.geometry.block_tokens

    def contains(self, key: bytes) -> int:
        """Where a block (16-byte key, see `KeyChain.key`) is: 0 in VRAM, 1 elsewhere, -1 nowhere."""
        self._check_open()
        if len(key) != 16:
            raise InputError(f"key of {len(key)} bytes: a block key has 16")
        return 1 if self._store.match(np.frombuffer(key, np.uint64).reshape(1, 2)).total else -1

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
        return self._store_from(chain, start, kv, slots[start - offset :], self.deadline(timeout)).new

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
        with self.stage(chain, first_token=start, timeout=timeout) as stage:
            loaded = stage.copy_to(kv, slots[start - offset :])
        result = np.zeros(chain.tokens, np.bool_)
        result[start:loaded] = True
        return like(tokens, result)

    # --- in steps: stage, layer by layer -------------------------------------------------------------------------

    def stage(
        self,
        chain: KeyChain,
        *,
        first_token: int = 0,
        stop_block: int | None = None,
        timeout: float | None = None,
    ) -> Stage:
        """Plans a prompt's load and starts it: pins what DRAM holds, brings up what lower tiers hold. Returns at once.

        first_token: tokens before it the caller has. stop_block: blocks from there on are not wanted. The stage must be
        released (use it as a context manager); `wait` on it for blocks that are on their way.
        """
        self._check_open()
        keys = chain.keys[:stop_block]
        block, begin = self.geometry.block_tokens, min(first_token, len(keys) * self.geometry.block_tokens)
        held = self._store.match(keys)
        in_dram = max(begin, held.dram * block)
        total = max(in_dram, held.total * block)
        segments = (Segment("dram", in_dram - begin), Segment("disk", total - in_dram))
        wanted = total - begin
        if self.config.engine.planner:
            wanted = plan_load(segments, chain.tokens, self.geometry.token_bytes, self.cost, start=begin).tokens
        deadline = self.deadline(timeout)
        hold = self._store.hold(keys[: (begin + wanted) // block], deadline=deadline)
        span = Span(begin, len(keys) * block, chain.tokens, total - begin - wanted)
        return Stage(self._store, hold, self._copier, self._layers, self.metrics, self.cost, span, deadline)

    def store_layers(self, chain: KeyChain, first_block: int = 0, stop_block: int | None = None) -> LayerStore | None:
        """Rows for the blocks of a chain that DRAM does not hold, to be put layer by layer; None if there is nothing to
        do.

        Blocks before `first_block` are not at hand. The result's `first_block` and `blocks` say which blocks it takes.
        """
        self._check_open()
        writing = self._write(chain, first_block, stop_block)
        return LayerStore(writing, self._copier, self._store.memory) if writing else None

    def observe_prefill(self, tokens: int, context: int, seconds: float) -> None:
        """Tells the planner what computing `tokens` behind `context` others took."""
        self.cost.recompute.observe(tokens, context, seconds)

    # --- the engine itself ---------------------------------------------------------------------------------------

    def get_stats(self) -> Figures:
        """Everything counted so far, by name; see docs/architecture.md for the reasons of misses."""
        return self.metrics.snapshot()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until what is stored is durable on disk, as far as it was admitted; False if it was not in time."""
        self._check_open()
        return self._store.flush(max(0.0, self.deadline(timeout) - time.monotonic()))

    def close(self, timeout: float | None = None) -> None:
        """Flushes within `timeout` and gives every resource back. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        deadline = self.deadline(timeout)
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
        """The moment (time.monotonic) by which a call that begins now must end."""
        return time.monotonic() + (self.config.engine.timeout_s if timeout is None else timeout)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _write(self, chain: KeyChain, given: int, stop: int | None = None) -> Writing | None:
        """Rows for the blocks that DRAM lacks; None if it lacks none, has no room, or lacks some before `given`."""
        keys = chain.keys[:stop]
        writing = self._store.write(keys, namespace=chain.namespace)
        lacking = len(keys) - writing.first
        if lacking and writing.first < given:
            self._skipped(len(keys) - given, Reason.NO_PARENT)
        else:
            self._skipped(lacking - len(writing.rows), Reason.NO_SLOT)
            if len(writing.rows):
                return writing
        writing.end()
        return None

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
        writing = self._write(chain, -(-start // block))
        if writing is None:
            return Stored(0, self._store.match(chain.keys).dram * block)
        step = max(1, COPY_BYTES // self.geometry.block_bytes)
        first, rows = writing.first, writing.rows
        new = done = 0
        try:
            while done < len(rows) and not (done and time.monotonic() > deadline) and not (cancel and cancel.is_set()):
                piece = rows[done : done + step]
                begin = (first + done) * block - start
                started = time.monotonic()
                self._copier.gather(kv, slots[begin : begin + len(piece) * block], self._store.memory, piece)
                size = len(piece) * self.geometry.block_bytes
                self.metrics.transferred("dram", "store", size, time.monotonic() - started)
                new += writing.commit(len(piece))
                done += len(piece)
        finally:
            writing.end()
        self._skipped(len(rows) - done, Reason.TIMEOUT)
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
        return self._root if namespace == self.namespace else namespace.digest()

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
