"""Layer by layer: a load that the model overtakes only where it must wait, and a store that follows the model."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from cairn.copy import Copier, PagedKV, Progress, TokenSlots
from cairn.engine.arguments import check_whole
from cairn.engine.writing import Writing
from cairn.errors import ClosedError, InputError, StorageError
from cairn.observe.layers import LayerTimes
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.observe.trace import NO_SPAN, Span

logger = logging.getLogger(__name__)

#: Copies all blocks layer by layer and tells of it; returns early once that is stopped. False: some cannot be had.
CopyLayers = Callable[[Progress], bool]


class LayerLoad:
    """Copies held blocks into the paged cache in the background, layer after layer.

    `wait(layer)` before the layer's attention reads the cache. The rows stay held by whoever started the load, who must
    `close` it before releasing them. progress: new, of all layers; who stops it stops the load. finished: told how long
    it took. times, trace: told of each layer. Thread-safe.
    """

    def __init__(
        self,
        executor: Executor,
        progress: Progress,
        copy: CopyLayers,
        finished: Callable[[float], None],
        *,
        times: LayerTimes | None = None,
        trace: Span = NO_SPAN,
    ) -> None:
        self.layers = progress.layers
        self._progress = progress
        self._times, self._trace = times, trace
        self._copy = copy
        self._finished = finished
        try:
            self._job = executor.submit(self._run)
        except RuntimeError:
            raise ClosedError("the engine was closed") from None
        # Nobody waits for what will not come, whatever ends the job, which may never have begun.
        self._job.add_done_callback(lambda _: progress.stop())

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        """The model has come to the layer: waits until it is in the paged cache. False if the timeout came first or the
        load was closed. Raises InputError for a layer that the model has not.
        """
        if not 0 <= layer < self.layers:
            raise InputError(f"layer {layer}: the model has layers 0..{self.layers - 1}")
        if self._times is None:
            return self._progress.follow(layer, timeout)
        started = time.monotonic()
        there = self._progress.follow(layer, timeout)
        waited = time.monotonic() - started
        self._times.waited(layer, waited)
        self._trace.event("layer", layer=layer, waited_s=waited, there=there)
        return there

    def complete(self, timeout: float | None = None) -> bool:
        """Waits until the load is over, or for `timeout`, for who does not follow it: whether every layer is there."""
        return self._progress.wait(self.layers, timeout)

    def close(self) -> BaseException | None:
        """Stops after the layers under way; when it returns nothing touches the paged cache or the rows. Idempotent.

        Returns what the copier raised, if it did: then `wait` is False for the layers that are not there.
        """
        self._progress.stop()
        return None if self._job.cancel() else self._job.exception()

    def _run(self) -> None:
        started = time.monotonic()
        if self._progress.stopped or not self._copy(self._progress):
            return
        seconds = time.monotonic() - started
        if self._times and (done := self._progress.done):
            self._times.copied(range(done), seconds)
        if self._progress.done == self.layers:
            self._finished(seconds)


class LayerStore:
    """Blocks that fill layer by layer; nothing of them can be found before `commit`.

    Owned by one request. After `commit` or `abort` it is over; `abort` after `commit` does nothing. skipped: told of
    blocks that were put and could not be kept, and why.
    """

    def __init__(self, writing: Writing, copier: Copier, skipped: Callable[[int, Reason], None]) -> None:
        self.first_block = writing.first
        self.blocks = len(writing.rows)
        self._writing = writing
        self._copier = copier
        self._missing = set(range(copier.geometry.layers))
        self._over = False
        self._lost: Reason | None = None
        self._skipped = skipped

    def put(self, layer: int, kv: PagedKV, slots: TokenSlots) -> None:
        """Copies one layer; slots: int64 [blocks * block_tokens], where the tokens from first_block on stand in
        `kv`. Raises InputError for a layer that the model has not, and for slots that are none.
        """
        if self._over:
            raise InputError(f"layer {layer}: this store was committed or aborted already")
        if not 0 <= layer < self._copier.geometry.layers:
            raise InputError(f"layer {layer}: the model has layers 0..{self._copier.geometry.layers - 1}")
        check_whole(slots)
        try:
            with self._writing.access() as memory:
                if memory is None:
                    self._lost = Reason.NODE_AWAY
                else:
                    self._copier.gather(kv, slots, memory, self._writing.rows, range(layer, layer + 1))
        except StorageError as error:
            log_once(logger, "gather", f"a copy failed: {error}")
            self._lost = Reason.IO_ERROR
        self._missing.discard(layer)

    def commit(self) -> int:
        """Publishes the blocks; returns how many are new. Raises InputError while a layer is missing."""
        if self._over:
            return 0
        if self._missing:
            raise InputError(f"layer {min(self._missing)} was not put: every layer must be before commit")
        new = 0 if self._lost else self._writing.commit(self.blocks)
        if lost := self._lost or (Reason.NODE_AWAY if self._writing.lost else None):
            self._skipped(self.blocks, lost)
        self.abort()
        return new

    def abort(self) -> None:
        """Gives back what was not committed."""
        self._over = True
        self._writing.end()
