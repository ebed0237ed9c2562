"""How a worker copies, behind one contract; here on the CPU, in `cuda_mover` on a GPU's own streams."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from cairn.codec.quantized import Quantizer
from cairn.copy import PagedKV, Progress, RowMemory, TokenSlots
from cairn.copy.base import Copier
from cairn.copy.cores import roam
from cairn.copy.cpu_quantized import cpu_copier
from cairn.engine.layers import LayerLoad
from cairn.engine.rehearsal import rehearse_copies
from cairn.errors import GeometryError
from cairn.kv import CANONICAL, KVGeometry, Layout

Rows = npt.NDArray[np.int32]

_THREADS = 2


class Polled(Protocol):
    """A copy under way, or one that failed, asked for by who has begun it."""

    def done(self) -> bool:
        """Whether it is over. Waits for nothing."""

    def exception(self) -> BaseException | None:
        """Waits for it; why it failed."""

    def result(self) -> float:
        """Waits for it; the seconds it took. Raises its exception."""


class Copying(Polled, Protocol):
    """One that tells by itself. A `Future[float]` is one."""

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Calls `fn` once it is over, in whatever thread."""


def failed(error: BaseException) -> Copying:
    """A copy that was not made."""
    future: Future[float] = Future()
    future.set_exception(error)
    return future


class Layers(ABC):
    """A load that a running forward pass follows. Owned by the model runner's thread."""

    @abstractmethod
    def wait(self, layer: int, timeout: float) -> None:
        """Returns when the model's next operation may read the layer, or when it never will be there."""

    @abstractmethod
    def end(self) -> Copying:
        """After the pass: the load as a whole; already failed if a layer is missing.

        Whatever the model is given to do from now on comes after the load's last write.
        """


class Timer(ABC):
    """Measures what the model does between its making and `stop`."""

    @abstractmethod
    def stop(self) -> None:
        """Marks the end of it."""

    @abstractmethod
    def seconds(self) -> float | None:
        """How long it took; None while it is not over."""


class Mover(ABC):
    """Copies between rows of the arena and the paged cache, without making the model wait.

    `load` and `store` begin behind what the model has been given to do so far. Their memory is the arena's part unless
    given. Called by the model runner's thread alone.
    """

    #: Whether what the model has been given to do so far is over whenever its thread comes to the next step.
    early: ClassVar[bool] = False

    def __init__(self, kv: PagedKV, memory: npt.NDArray[np.uint8]) -> None:
        self.kv, self.memory = kv, memory
        #: Moves the same bytes, but tokens to any slot, where `kv` has opaque pages whose inside is known all the same.
        self.by_token: Mover | None = None

    @abstractmethod
    def load(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        """Rows -> paged cache."""

    @abstractmethod
    def store(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        """Paged cache -> rows."""

    @abstractmethod
    def load_layers(self, slots: TokenSlots, rows: Rows) -> Layers:
        """Rows -> paged cache, layer after layer."""

    @abstractmethod
    def settle_stores(self) -> None:
        """What the model is given to do from now on comes after the stores under way: it may overwrite their pages."""

    @abstractmethod
    def timer(self) -> Timer:
        """Starts to measure what the model is given to do from now on."""

    @abstractmethod
    def close(self) -> None:
        """Finishes what is under way."""


class _CpuLayers(Layers):
    def __init__(self, load: LayerLoad) -> None:
        self._load = load
        self._started = time.monotonic()

    def wait(self, layer: int, timeout: float) -> None:
        self._load.wait(layer, timeout)

    def end(self) -> Copying:
        complete = self._load.complete(0.0)
        error = self._load.close()
        if not complete:
            return failed(error or TimeoutError("its deadline passed"))
        over: Future[float] = Future()
        over.set_result(time.monotonic() - self._started)
        return over


class _CpuTimer(Timer):
    """The model runs in the caller's thread."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: float | None = None

    def stop(self) -> None:
        self._seconds = time.monotonic() - self._started

    def seconds(self) -> float | None:
        return self._seconds


class CpuMover(Mover):
    """For a paged cache in host memory."""

    early = True

    def __init__(self, copier: Copier, kv: PagedKV, memory: npt.NDArray[np.uint8]) -> None:
        super().__init__(kv, memory)
        rehearse_copies()
        self._copier = copier
        copier.prepare(kv)
        self._pool = ThreadPoolExecutor(_THREADS, "cairn-copy", roam)
        self._stores: list[Future[float]] = []

    def load(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        return self._pool.submit(self._timed, self._copier.scatter, slots, rows, memory)

    def store(self, slots: TokenSlots, rows: Rows, memory: RowMemory | None = None) -> Copying:
        store = self._pool.submit(self._timed, self._copier.gather, slots, rows, memory)
        self._stores = [other for other in self._stores if not other.done()] + [store]
        return store

    def load_layers(self, slots: TokenSlots, rows: Rows) -> Layers:
        def copy(progress: Progress) -> bool:
            self._copier.scatter_layers(self.kv, slots, self.memory, rows, progress)
            return True

        return _CpuLayers(LayerLoad(self._pool, Progress(self._copier.geometry.layers), copy, lambda _: None))

    def settle_stores(self) -> None:
        for store in self._stores:
            store.exception()

    def timer(self) -> Timer:
        return _CpuTimer()

    def close(self) -> None:
        self._pool.shutdown(wait=True)  # cancels nothing: the model's thread asks what became of each copy
        self._copier.close()

    def _timed(self, copy: Any, slots: TokenSlots, rows: Rows, memory: RowMemory | None) -> float:
        started = time.monotonic()
        copy(self.kv, slots, self.memory if memory is None else memory, rows)
        return time.monotonic() - started


def mover_for(
    kv_caches: list[Any],
    geometry: KVGeometry,
    memory: npt.NDArray[np.uint8],
    arena: npt.NDArray[np.uint8],
    *,
    threads: int,
    overlapping: bool,
    compressed: bool = False,
    quantizer: Quantizer | None = None,
    page: Layout = CANONICAL,
    vram: bool = False,
) -> Mover:
    """The mover for vLLM's tensors, one a layer. memory: this rank's part of the arena's rows. overlapping: see
    `mode.steps_overlap`. quantizer: makes the rows of blocks, if they are quantized. page: the order of values in pages
    of a CPU. vram: rows may be in VRAM.

    Raises GeometryError for tensors whose order of dimensions is not known, and for such as are moved as opaque pages
    where blocks are `compressed`, or quantized.
    """
    if geometry.planes == 1 and kv_caches[0].dim() == 4:  # vLLM from 0.32 on: MLA's latent as if it were a head's
        kv_caches = [cache.squeeze(1) for cache in kv_caches]
    first = kv_caches[0]
    on_cpu = first.device.type == "cpu"
    layout = {3: "mla", 4: "vllm"}.get(first.dim(), "nhd" if first.shape[0] == 2 else "nhd_paged")
    entries: Sequence[Any] = kv_caches
    if quantizer and layout == "vllm" and not on_cpu:
        # A head's vector of K and that of V, one behind the other. If they were not, groups would be odd, not wrong.
        layout, entries = "hnd", [tensor.split(geometry.head_dim, dim=-1) for tensor in kv_caches]
    kv = PagedKV.from_tensors(entries, layout, geometry)
    if compressed and kv.opaque:
        raise GeometryError("pages of this attention backend are opaque to codecs: set compression.algorithm to none")
    if on_cpu:
        return CpuMover(cpu_copier(geometry, quantizer, threads, page), kv, memory)
    from cairn.connect.vllm.cuda_mover import CudaMover

    return CudaMover(geometry, kv, memory, arena, overlapping=overlapping, quantizer=quantizer, vram=vram)


def token_geometry(geometry: KVGeometry) -> KVGeometry:
    """Of the same bytes, as if all that a layer has of a token were one vector."""
    g = geometry
    return KVGeometry(
        layers=g.layers,
        kv_heads=1,
        head_dim=g.kv_heads * 2 * g.head_dim,
        dtype=g.dtype,
        block_tokens=g.block_tokens,
        planes=1,
    )


def by_token(
    kv_caches: list[Any], geometry: KVGeometry, memory: npt.NDArray[np.uint8], arena: npt.NDArray[np.uint8]
) -> Mover | None:
    """A mover of single tokens for pages [heads, page_tokens, 2 * dim] on a GPU in which a token is one run of bytes:
    what is in it need not be known. None for others.
    """
    first, vector = kv_caches[0], geometry.kv_heads * 2 * geometry.head_dim
    packed = first.dim() == 4 and first.stride()[1:] == (2 * geometry.head_dim, vector, 1)
    if first.device.type == "cpu" or not packed:
        return None
    from cairn.connect.vllm.cuda_mover import CudaMover

    token = token_geometry(geometry)
    kv = PagedKV.from_tensors([cache.transpose(1, 2).flatten(2) for cache in kv_caches], "mla", token)
    return CudaMover(token, kv, memory, arena, overlapping=False)
