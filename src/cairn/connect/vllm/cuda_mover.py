"""A worker's copies on a GPU: enqueued on streams of their own, in order with the model's, by the model's own thread.

To enqueue a copy takes that thread a few tenths of a millisecond, and never a wait. Threads for it took more: each copy
cost the model's thread as much again in turns of the interpreter (docs/architecture.md has the figures).
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.codec.quantized import Quantizer
from cairn.connect.vllm.movers import Copying, Layers, Mover, Rows, Timer, failed
from cairn.copy import PagedKV, RowMemory, TokenSlots
from cairn.copy.cuda import CudaCopier, Enqueued
from cairn.copy.cuda_quantized import QuantizedCudaCopier
from cairn.errors import InputError, StorageError
from cairn.kv import KVGeometry
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

#: A layered load goes in so many pieces at most, each of at least so many bytes of a row: more pieces let the model
#: start sooner, shorter ones cost the bus more.
_PIECES, _PIECE_BYTES = 4, 512 << 10
#: So many pieces are enqueued ahead of those that the model needs: the bus always has some to go on with, and the
#: model's first kernel is not launched behind the last of them.
_AHEAD = 2
#: What enqueueing a copy may raise; torch's errors are RuntimeErrors.
_FAILURES = (StorageError, InputError, RuntimeError)


class _CudaCopy:
    """A `Copying` that is asked for, not waited for: no thread, unless somebody is to be told."""

    def __init__(self, copy: Enqueued, mover: "CudaMover") -> None:
        self._copy = copy
        self._mover = mover

    def done(self) -> bool:
        return bool(self._copy.end.query())

    def exception(self) -> BaseException | None:
        self._copy.synchronize()
        return None

    def result(self) -> float:
        return self._copy.seconds()

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        self._mover.after(self._copy, lambda: fn(self))


class _CudaLayers(Layers):
    """The model's stream waits for the copies' events, its thread for nothing.

    A piece that cannot be enqueued ahead of its time is tried once more when the model needs it. If it fails then, so
    has the load; where steps overlap that raises StorageError, because vLLM could not take the step back.
    """

    def __init__(self, mover: "CudaMover", slots: TokenSlots, rows: Rows) -> None:
        self._mover = mover
        self._arguments = (mover.kv, slots, mover.memory, rows)
        self._after = mover.stream().record_event()
        self._copies: list[Enqueued] = []
        self._error: Exception | None = None
        self._waited = 0
        self._enqueue(0)

    def wait(self, layer: int, timeout: float) -> None:  # noqa: ARG002 - nothing here takes long
        self._follow(layer // self._mover.layers_at_once + 1)

    def end(self) -> Copying:
        self._follow(len(self._mover.spans))
        if self._error:
            return failed(self._error)
        return _CudaCopy(Enqueued(self._copies[0].begin, self._copies[-1].end), self._mover)

    def _follow(self, pieces: int) -> None:
        """Orders the model behind the first `pieces` pieces, or those of them that could be enqueued."""
        if pieces > self._waited:
            self._waited = pieces
            self._enqueue(pieces)
            if self._copies:
                self._mover.stream().wait_event(self._copies[min(pieces, len(self._copies)) - 1].end)

    def _enqueue(self, needed: int) -> None:
        """What is missing of the first `needed` pieces and those ahead of them, in order."""
        if self._error:
            return
        try:
            for span in self._mover.spans[len(self._copies) : needed + _AHEAD]:
                self._copies.append(self._mover.copier.scatter_async(*self._arguments, span, self._after))
        except _FAILURES as error:
            if len(self._copies) >= needed:
                return
            if self._mover.overlapping:
                raise StorageError(f"a layered load failed: {error}") from error
            log_once(logger, "layered load", f"a layered load failed: {error}")
            self._error = error


class _CudaTimer(Timer):
    def __init__(self, mover: "CudaMover") -> None:
        self._mover = mover
        self._begin, self._end = (mover.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record(mover.stream())

    def stop(self) -> None:
        self._end.record(self._mover.stream())

    def seconds(self) -> float | None:
        return self._begin.elapsed_time(self._end) / 1e3 if self._end.query() else None


class CudaMover(Mover):
    """For a paged cache in a GPU's memory. Pins the arena (up to half a second a GiB) and takes staging memory.

    overlapping: see `mode.steps_overlap`. quantizer: makes the rows, if they are quantized. vram: rows may be in VRAM.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        kv: PagedKV,
        memory: npt.NDArray[np.uint8],
        arena: npt.NDArray[np.uint8],
        *,
        overlapping: bool,
        quantizer: Quantizer | None = None,
        vram: bool = False,
    ) -> None:
        import torch

        super().__init__(kv, memory)
        self.torch: Any = torch
        self.overlapping = overlapping
        self.copier = QuantizedCudaCopier(quantizer, kv.device) if quantizer else CudaCopier(geometry, kv.device)
        layers = geometry.layers
        self.layers_at_once = min(layers, max(-(-layers // _PIECES), -(-_PIECE_BYTES // geometry.layer_bytes)))
        self.spans = [
            range(first, min(layers, first + self.layers_at_once)) for first in range(0, layers, self.layers_at_once)
        ]
        self._waiter: ThreadPoolExecutor | None = None
        self._stores: list[Enqueued] = []
        self.copier.register(arena)
        self.copier.prepare(kv, direct=vram)

    def load(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        memory = self.memory if memory is None else memory
        try:
            return _CudaCopy(self.copier.scatter_async(self.kv, slots, memory, rows, None, self._now()), self)
        except _FAILURES as error:
            return failed(error)

    def store(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        memory = self.memory if memory is None else memory
        try:
            store = self.copier.gather_async(self.kv, slots, memory, rows, None, self._now())
        except _FAILURES as error:
            return failed(error)
        # All of them, as those to VRAM and those to DRAM end on streams of their own.
        self._stores = [other for other in self._stores if not other.end.query()] + [store]
        return _CudaCopy(store, self)

    def load_layers(self, slots: TokenSlots, rows: Rows) -> Layers:
        return _CudaLayers(self, slots, rows)

    def settle_stores(self) -> None:
        for store in self._stores:
            self.stream().wait_event(store.end)

    def timer(self) -> Timer:
        return _CudaTimer(self)

    def close(self) -> None:
        if self.by_token:
            self.by_token.close()
        self.copier.close()
        if self._waiter:
            self._waiter.shutdown(wait=True)

    def stream(self) -> Any:
        """The model's stream: the current one of the model runner's thread."""
        return self.torch.cuda.current_stream()

    def after(self, copy: Enqueued, then: Callable[[], object]) -> None:
        """Calls `then` once the copy is over, from a thread that waits, asleep: whoever must know even while the model
        does nothing."""
        if self._waiter is None:
            # A thread without a device of its own would open a context on the first one.
            self._waiter = ThreadPoolExecutor(1, "cairn-copied", lambda: self.torch.cuda.set_device(self.kv.device))

        def wait() -> None:
            try:
                copy.synchronize()
            finally:
                then()

        self._waiter.submit(wait)

    def _now(self) -> Any:
        """An event behind what the model has been given to do so far."""
        return self.stream().record_event()
