"""CUDA's streams without a GPU: work enqueued on streams is done in any order that their events allow."""

import ctypes
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np


class Event:
    """Over once `target` of the recorded stream's operations are done; never recorded: over."""

    def __init__(self, device: "FakeCuda", **_: Any) -> None:
        self._device, self.stream, self.target = device, None, 0  # type: ignore[var-annotated]

    def record(self, stream: "Stream") -> None:
        self.stream, self.target = stream, stream.enqueued

    def query(self) -> bool:
        return done(self.stream, self.target)

    def synchronize(self) -> None:
        self._device.run(self.query)

    def elapsed_time(self, other: "Event") -> float:
        return float(other.target)


class Stream:
    """A queue of operations, each a callable, or (stream, target) to wait for."""

    def __init__(self, device: "FakeCuda") -> None:
        self._device = device
        self.cuda_stream = len(device.streams) + 1
        self.queue: list[Any] = []
        self.enqueued = self.finished = 0
        device.add(self)

    def push(self, operation: Any) -> None:
        with self._device.lock:
            self.queue.append(operation)
            self.enqueued += 1

    def wait_event(self, event: Event) -> None:
        # What counts is what the event stands for now: it may be recorded again.
        self.push((event.stream, event.target))

    def record_event(self) -> Event:
        event = Event(self._device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._device.run(lambda: self.finished == self.enqueued)


def done(stream: Stream | None, target: int) -> bool:
    return stream is None or stream.finished >= target


class FakeCuda:
    """A device whose streams run when somebody synchronizes, in an order drawn by `seed`.

    As `torch` and as the driver's library; `batches` keeps the lengths of its batches, `pinned` the addresses.
    """

    def __init__(self, torch: Any, seed: int) -> None:
        self.streams: list[Stream] = []
        self.batches: list[int] = []
        self.pinned: set[int] = set()
        self.lock = threading.RLock()
        self._random = random.Random(seed)
        self._favoured: list[Stream] = []
        self._local = threading.local()
        self.default = Stream(self)
        self.torch = SimpleNamespace(
            device=torch.device,
            uint8=torch.uint8,
            int64=torch.int64,
            empty=lambda shape, dtype, **_: torch.full(shape, 0xA5, dtype=dtype),
            cuda=SimpleNamespace(
                device=lambda _: nullcontext(),
                synchronize=lambda _: None,
                set_device=lambda _: None,
                current_stream=lambda *_: self._current(),
                Stream=lambda _: Stream(self),
                Event=lambda **_: Event(self),
                stream=self._switch,
            ),
        )

    def enqueue(self, operation: Callable[[], None]) -> None:
        """On the current stream."""
        self._current().push(operation)

    def add(self, stream: Stream) -> None:
        """At a random place in the order in which streams come first."""
        self.streams.append(stream)
        self._favoured.insert(self._random.randrange(len(self.streams)), stream)

    def run(self, over: Callable[[], bool]) -> None:
        """Does operations, of any stream that may go on, until `over`."""
        while True:
            with self.lock:
                if over():
                    return
                self._step()

    def _step(self) -> None:
        ready = [s for s in self.streams if s.queue and (callable(s.queue[0]) or done(*s.queue[0]))]
        assert ready, "every stream waits for another"
        if self._random.random() < 0.1:
            self._random.shuffle(self._favoured)
        stream = max(ready, key=lambda s: self._favoured.index(s))
        operation = stream.queue.pop(0)
        if callable(operation):
            operation()
        stream.finished += 1

    @contextmanager
    def _switch(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self._current(), stream
        yield
        self._local.stream = before

    def _current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    # --- the driver's library ------------------------------------------------------------------------------------

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0

    def cuMemHostRegister_v2(self, address: Any, size: Any, flags: int) -> int:  # noqa: N802
        if address.value in self.pinned:
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.pinned.add(address.value)
        return 0

    def cuMemHostUnregister(self, address: Any) -> int:  # noqa: N802
        self.pinned.remove(address.value)
        return 0

    def cuMemcpyAsync(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        self._copy(stream, [(target.value, source.value, size.value)])
        return 0

    def cuMemcpyBatchAsync_v2(self, *arguments: Any) -> int:  # noqa: N802
        count = arguments[3].value
        self.batches.append(count)
        lists = [np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(p.value)) for p in arguments[:3]]
        self._copy(arguments[7], list(zip(*(part.tolist() for part in lists), strict=True)))
        return 0

    def _copy(self, stream: Any, pieces: list[tuple[int, int, int]]) -> None:
        def copy() -> None:
            for target, source, size in pieces:
                ctypes.memmove(target, source, size)

        self.streams[stream.value - 1].push(copy)


def _enqueued(fake: FakeCuda, kernel: Callable[..., None]) -> Callable[..., None]:
    return lambda *arguments, **named: fake.enqueue(lambda: kernel(*arguments, **named))


def install(monkeypatch: Any, seed: int = 0) -> FakeCuda:
    """Puts a fake device in the place of torch's CUDA, the driver and the kernels (Triton's interpreter)."""
    import importlib

    import torch

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where the kernel is decorated
    kernels = [importlib.import_module(f"cairn.copy.triton_{name}") for name in ("kernel", "quantized")]
    driver = importlib.import_module("cairn.copy.driver")
    fake = FakeCuda(torch, seed)
    monkeypatch.setitem(sys.modules, "torch", fake.torch)
    monkeypatch.setattr(driver, "_library", lambda: fake)
    for kernel, name in [*((one, "move") for one in kernels), (kernels[0], "fetch")]:
        monkeypatch.setattr(kernel, name, _enqueued(fake, getattr(kernel, name)))
    return fake
