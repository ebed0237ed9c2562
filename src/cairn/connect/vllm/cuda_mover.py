"""A worker's copies on a GPU: enqueued by threads of their own on streams of their own, in order with the model's."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cairn.connect.vllm.movers import Layers, Mover, Rows, Timer
from cairn.copy import PagedKV, TokenSlots
from cairn.copy.cuda import CudaCopier, Enqueued
from cairn.errors import StorageError
from cairn.kv import KVGeometry
from cairn.observe.log import log_once

logger = logging.getLogger(__name__)

R = TypeVar("R")

#: A layered load goes in so many pieces at most, each of at least so many bytes of a row: more pieces let the model
#: start sooner, shorter ones cost the bus more.
_PIECES, _PIECE_BYTES = 4, 512 << 10


class _Direction:
    """Two threads a direction: one enqueues, one waits, so that no copy waits until the one before is over."""

    def __init__(self, name: str, use_device: Callable[[], None]) -> None:
        self._enqueuing = ThreadPoolExecutor(1, f"cairn-{name}", use_device)
        self._waiting = ThreadPoolExecutor(1, f"cairn-{name}-wait", use_device)

    def submit(self, enqueue: Callable[..., R], *arguments: Any) -> "Future[R]":
        return self._enqueuing.submit(enqueue, *arguments)

    def seconds(self, copy: "Future[Enqueued]") -> "Future[float]":
        """The seconds a copy takes, once it is over."""
        return self._waiting.submit(lambda: copy.result().seconds())

    def close(self) -> None:
        self._enqueuing.shutdown(wait=True, cancel_futures=True)
        self._waiting.shutdown(wait=True, cancel_futures=True)


class _CudaLayers(Layers):
    """The model's stream waits for the copies' events, and its thread only until the event it needs is there.

    A piece that does not come is enqueued by the model's thread itself. If even that fails, the load has failed; where
    steps overlap that raises StorageError, because vLLM could not take the step back.
    """

    def __init__(self, mover: "CudaMover", slots: TokenSlots, rows: Rows, after: Any) -> None:
        self._mover = mover
        self._arguments = (mover.kv, slots, mover.memory, rows)
        self._after = after
        self._copies: list[Enqueued] = []
        self._waited = 0
        self._changed = threading.Condition()
        self._over = False
        self._job = mover.loads.submit(self._run)

    def wait(self, layer: int, timeout: float) -> None:
        wanted = layer // self._mover.layers_at_once + 1
        if wanted <= self._waited:
            return
        with self._changed:
            self._changed.wait_for(lambda: len(self._copies) >= wanted or self._over, timeout)
        if len(self._copies) < wanted:
            self._rescue()
        self._follow()

    def end(self) -> "Future[float]":
        if len(self._copies) < len(self._mover.spans):
            self._rescue()
        self._follow()
        if len(self._copies) == len(self._mover.spans):
            whole = self._mover.loads.submit(lambda: Enqueued(self._copies[0].begin, self._copies[-1].end))
            return self._mover.loads.seconds(whole)
        failed: Future[float] = Future()
        failed.set_exception(self._job.exception() or TimeoutError("its deadline passed"))
        return failed

    def _follow(self) -> None:
        """Orders the model behind the copies that were enqueued so far."""
        self._waited = len(self._copies)
        if self._waited:
            self._mover.stream().wait_event(self._copies[self._waited - 1].end)

    def _rescue(self) -> None:
        """Enqueues what is missing, once the other thread has stopped to."""
        self._over = True
        self._job.exception()
        try:
            self._enqueue()
        except StorageError as error:
            if self._mover.overlapping:
                raise
            log_once(logger, "layered load", f"a layered load failed: {error}")

    def _run(self) -> None:
        try:
            self._enqueue(lambda: self._over)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _enqueue(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """The pieces that are missing, in order."""
        for span in self._mover.spans[len(self._copies) :]:
            if stopped():
                return
            copy = self._mover.copier.scatter_async(*self._arguments, span, self._after)
            with self._changed:
                self._copies.append(copy)
                self._changed.notify_all()


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

    overlapping: see `mode.steps_overlap`.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        kv: PagedKV,
        memory: npt.NDArray[np.uint8],
        arena: npt.NDArray[np.uint8],
        *,
        overlapping: bool,
    ) -> None:
        import torch

        super().__init__(kv, memory)
        self.torch: Any = torch
        self.overlapping = overlapping
        layers = geometry.layers
        self.layers_at_once = min(layers, max(-(-layers // _PIECES), -(-_PIECE_BYTES // geometry.layer_bytes)))
        self.spans = [
            range(first, min(layers, first + self.layers_at_once)) for first in range(0, layers, self.layers_at_once)
        ]
        # A thread without a device of its own would open a context on the first one.
        use_device = partial(torch.cuda.set_device, kv.device)
        self.loads, self._stores = _Direction("load", use_device), _Direction("store", use_device)
        self._latest_store: Future[Enqueued] | None = None
        self.copier = CudaCopier(geometry, kv.device)
        self.copier.register(arena)
        self.copier.prepare(kv)

    def load(self, slots: TokenSlots, rows: Rows) -> "Future[float]":
        return self.loads.seconds(self._start(self.loads, self.copier.scatter_async, slots, rows))

    def store(self, slots: TokenSlots, rows: Rows) -> "Future[float]":
        self._latest_store = self._start(self._stores, self.copier.gather_async, slots, rows)
        return self._stores.seconds(self._latest_store)

    def load_layers(self, slots: TokenSlots, rows: Rows) -> Layers:
        return _CudaLayers(self, slots, rows, self.stream().record_event())

    def settle_stores(self) -> None:
        if self._latest_store and not self._latest_store.exception():
            self.stream().wait_event(self._latest_store.result().end)

    def timer(self) -> Timer:
        return _CudaTimer(self)

    def close(self) -> None:
        self.loads.close()
        self._stores.close()
        self.copier.close()

    def stream(self) -> Any:
        """The model's stream: the current one of the model runner's thread."""
        return self.torch.cuda.current_stream()

    def _start(
        self, direction: _Direction, copy: Callable[..., Enqueued], slots: TokenSlots, rows: Rows
    ) -> "Future[Enqueued]":
        return direction.submit(copy, self.kv, slots, self.memory, rows, None, self.stream().record_event())
