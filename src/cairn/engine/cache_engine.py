"""`CacheEngine`: the engine with both faces. Here the asynchronous one: match, launch, wait, cancel.

Call names, arguments and statuses are those that users of FlexKV's `KVManager` know.
"""

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.config import Config
from cairn.engine.arguments import check_whole, mask_start, slot_array
from cairn.engine.core import EngineCore
from cairn.engine.hold import Hold
from cairn.engine.leases import Leases
from cairn.engine.stage import Stage
from cairn.engine.task import Task, TaskResult, TaskStatus
from cairn.errors import CairnError, ClosedError, InputError
from cairn.kv import Namespace
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason

logger = logging.getLogger(__name__)

_WORKERS = 4
#: Finished tasks that nobody has waited for are kept up to this many; then the oldest are forgotten.
_KEPT = 4096


class CacheEngine(EngineCore):
    """The KV cache of one model beyond its engine's own: see `EngineCore` for the rules that all calls share.

    Asynchronous calls return task ids at once. Before `launch` (or with `put_async` / `get_async` before the call) the
    paged cache must be known by `register_kv_caches`. A matched task keeps its blocks for `engine.lease_s`; not
    launched until then it is cancelled. The slots of a launched task are Cairn's until `wait` reports it, whatever the
    status.
    """

    def __init__(self, namespace: Namespace, config: Config | None = None, *, node: str | None = None) -> None:
        super().__init__(namespace, config, node=node)
        self._leases = Leases()
        self._ids = itertools.count(1)
        self._tasks: dict[int, Task] = {}
        self._tasks_lock = threading.Lock()
        self._workers = ThreadPoolExecutor(_WORKERS, "cairn-task")

    def get_match(
        self, token_ids: Any, token_mask: Any = None, cpu_only: bool = False, namespace: Namespace | None = None
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Finds what can be loaded and begins to bring it up; returns the task and bool [n], the tokens it would load.

        cpu_only: only what DRAM holds now. Of a remote store only what is known of it already, since this does not
        wait: `prefetch_async` first.
        """
        chain = self._chain(token_ids, namespace)
        start = mask_start(token_mask, chain.tokens)
        self.ask(chain)
        held = self._store.match(chain.keys)
        stop_block = held.dram if cpu_only else held.total
        stage = self.stage(chain, first_token=start, stop_block=stop_block, timeout=self.config.engine.lease_s)
        task = Task(chain, start, max(start, stage.planned_tokens), self._run_get)
        task.held = stage
        return self._add(task), task.result(TaskStatus.UNREADY, task.stop).mask

    def put_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace | None = None
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Finds what is not stored yet; returns the task and bool [n], the tokens (of whole blocks) it would store."""
        chain = self._chain(token_ids, namespace)
        block = self.geometry.block_tokens
        held = self._store.match(chain.keys).stored * block
        start = max(held, mask_start(token_mask, chain.tokens))
        task = Task(chain, start, max(start, len(chain) * block), self._run_put)
        return self._add(task), task.result(TaskStatus.UNREADY, task.stop).mask

    def get_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace | None = None
    ) -> int:
        """`get_match` and `launch` in one. slot_mapping: integers [n], the slot of each token."""
        task, _ = self.get_match(token_ids, token_mask, namespace=namespace)
        return self._launched(task, slot_mapping)

    def put_async(
        self, token_ids: Any, slot_mapping: Any, token_mask: Any = None, namespace: Namespace | None = None
    ) -> int:
        """`put_match` and `launch` in one. slot_mapping: integers [n], the slot of each token."""
        task, _ = self.put_match(token_ids, token_mask, namespace=namespace)
        return self._launched(task, slot_mapping)

    def prefetch_async(self, token_ids: Any, namespace: Namespace | None = None) -> int:
        """Brings a prompt's blocks up to DRAM, so that the request that follows finds them there."""
        chain = self._chain(token_ids, namespace)
        task = Task(chain, 0, 0, self._run_prefetch)
        if self.ask(chain) is None:
            self._hold(task)
        number = self._add(task)
        self._start([task])
        return number

    def launch(
        self,
        task_ids: Sequence[int],
        slot_mappings: Sequence[Any],
        as_batch: bool = False,
        layerwise_transfer: bool = False,
    ) -> None:
        """Starts matched tasks; slot_mappings[i]: integers [n], the slot of each token of task i.

        as_batch: one worker does them all, in order. layerwise_transfer: gets copy layer by layer, see `wait_layer`.
        """
        self._check_open()
        if len(task_ids) != len(slot_mappings):
            raise InputError(f"{len(slot_mappings)} slot_mappings for {len(task_ids)} tasks: each task needs one")
        if len(set(task_ids)) != len(task_ids):
            raise InputError(f"task_ids {list(task_ids)}: each task must stand there once")
        kv = self._paged(None)
        tasks = [self._task(number) for number in task_ids]
        for number, task, mapping in zip(task_ids, tasks, slot_mappings, strict=True):
            if task.launched or task.future.done():
                raise InputError(f"task {number}: was launched before, cancelled, or its lease has run out")
            slots = slot_array(mapping, task.chain.tokens, 0)
            kv.check_range(slots)
            if task.held is None:  # a put
                check_whole(slots[task.start : task.stop])
            task.slots = slots[task.start :]
            task.layerwise = layerwise_transfer
        for group in [tasks] if as_batch else [[task] for task in tasks]:
            self._start(group)

    def wait(self, task_ids: Sequence[int], timeout: float = 20.0, completely: bool = False) -> dict[int, TaskResult]:
        """Waits for tasks; the results are handed out once. What is not finished in time is stopped first.

        completely: also wait until what was put is durable on disk.
        """
        deadline = self.deadline(timeout)
        results = {number: self._finish(number, deadline) for number in task_ids}
        if completely:
            self.flush(max(0.0, deadline - time.monotonic()))
        return results

    def wait_layer(self, task_id: int, layer: int, timeout: float = 20.0) -> bool:
        """Waits until one layer of a get launched layerwise is in the paged cache; False if it will not be in time."""
        task, deadline = self._task(task_id), self.deadline(timeout)
        if not task.layers_started.wait(max(0.0, deadline - time.monotonic())) or task.layers is None:
            return False
        return task.layers.wait(layer, max(0.0, deadline - time.monotonic()))

    def try_wait(self, task_ids: Sequence[int]) -> dict[int, TaskResult]:
        """Results of those tasks that are finished, UNREADY for the others, which go on."""
        results = {}
        for number in task_ids:
            task = self._tasks.get(number)
            unready = task is not None and not task.future.done()
            results[number] = task.result(TaskStatus.UNREADY) if task and unready else self._finish(number, 0.0)
        return results

    def cancel(self, task_ids: Sequence[int]) -> None:
        """Stops tasks at their next step. They still have to be waited for before their slots are used again."""
        for number in task_ids:
            task = self._tasks.get(number)
            if task:
                task.abandon()

    def close(self, timeout: float | None = None) -> None:
        """Stops all tasks, then as `EngineCore.close`."""
        if self._closed.is_set():
            return
        self._leases.stop()
        for task in list(self._tasks.values()):
            task.abandon()
        self._workers.shutdown(wait=True)
        super().close(timeout)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _add(self, task: Task) -> int:
        with self._tasks_lock:
            number = next(self._ids)
            self._tasks[number] = task
            surplus = len(self._tasks) - _KEPT
            for old in [n for n, t in self._tasks.items() if t.future.done()][:surplus] if surplus > 0 else ():
                del self._tasks[old]
        task.lease = self._leases.start(self.config.engine.lease_s, task.abandon)
        if not task.lease:  # closed meanwhile
            task.abandon()
            raise ClosedError("the engine was closed")
        return number

    def _launched(self, number: int, slot_mapping: Any) -> int:
        """A task that nobody has heard of yet; where it cannot be launched, nobody ever will."""
        try:
            self.launch([number], [slot_mapping])
        except CairnError:
            with self._tasks_lock:
                task = self._tasks.pop(number)
            self._leases.end(task.lease)
            task.abandon()
            raise
        return number

    def _task(self, number: int) -> Task:
        task = self._tasks.get(number)
        if task is None:
            raise InputError(f"task {number}: there is no such task, or its result was handed out")
        return task

    def _start(self, tasks: list[Task]) -> None:
        for task in tasks:
            self._leases.end(task.lease)
            task.launched = True
        try:
            self._workers.submit(self._run_all, tasks)
        except RuntimeError:  # closed meanwhile
            for task in tasks:
                task.abandon()

    def _run_all(self, tasks: list[Task]) -> None:
        for task in tasks:
            if task.begin():
                task.future.set_result(self._run(task))

    def _run(self, task: Task) -> TaskResult:
        try:
            try:
                return task.run(task)
            finally:
                task.layers_started.set()
                if task.held:
                    task.held.release()  # raises what a layer's copy did
        except Exception as error:  # noqa: BLE001 - a bug must not reach the engine's step: counted, logged, a miss
            log_once(logger, f"task {type(error).__name__}", f"a task failed: {error!r}")
            self.metrics.failures.add(1, tier="engine", reason=Reason.INTERNAL)
            return task.result(TaskStatus.FAILED)

    def _run_get(self, task: Task) -> TaskResult:
        assert isinstance(task.held, Stage)
        assert task.slots is not None
        if not task.layerwise:
            return task.outcome(task.held.copy_to(self._paged(None), task.slots))
        task.held.wait()
        task.layers = task.held.load_layers(self._paged(None), task.slots)
        task.layers_started.set()
        return task.outcome(task.held.loaded_tokens if task.layers.complete() else task.start)

    def _run_put(self, task: Task) -> TaskResult:
        assert task.slots is not None
        deadline = self.deadline(None)
        stored = self._store_from(task.chain, task.start, self._paged(None), task.slots, deadline, task.cancelled)
        return task.outcome(stored.upto)

    def _run_prefetch(self, task: Task) -> TaskResult:
        if task.held is None:
            self.seek(task.chain)
            self._hold(task)
        assert isinstance(task.held, Hold)
        if task.cancelled.is_set():
            task.held.abandon()
        return task.outcome(task.held.wait(self.deadline(None)) * self.geometry.block_tokens)

    def _hold(self, task: Task) -> None:
        """Begins to bring up all that is held of a prefetch's prompt."""
        held = self._store.match(task.chain.keys).total
        task.stop = held * self.geometry.block_tokens
        task.held = self._store.hold(task.chain.keys[:held], deadline=self.deadline(None))

    def _finish(self, number: int, deadline: float) -> TaskResult:
        task = self._tasks.get(number)
        if task is None:
            return TaskResult(TaskStatus.NOTFOUND, np.zeros(0, np.bool_))
        if not task.launched and not task.future.done():
            return task.result(TaskStatus.UNREADY)
        try:
            result = task.future.result(max(0.0, deadline - time.monotonic()))
        except CancelledError:
            result = task.result(TaskStatus.CANCELLED)
        except FutureTimeoutError:
            result = self._stop(task)
        with self._tasks_lock:
            self._tasks.pop(number, None)
        return result

    @staticmethod
    def _stop(task: Task) -> TaskResult:
        """Stops a task whose time is up; returns once it is certain that nothing touches its slots any more."""
        task.abandon()
        if task.future.cancelled() or task.slots is None:  # a prefetch has none, and may still ask a remote store
            return task.result(TaskStatus.TIMEOUT)
        # Not a wait without a bound: the task ends at its next step, which is one piece of a copy.
        return TaskResult(TaskStatus.TIMEOUT, task.future.result().mask)
