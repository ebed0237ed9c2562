"""The calls of the CUDA driver that torch does not offer, through ctypes: no Python loop over copies."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cairn.copy.pieces import Pieces
from cairn.errors import StorageError

_STREAM_ORDER = 1
_PORTABLE_AND_MAPPED = 3
_ALREADY_REGISTERED = 712
_ENABLE_PEER_ACCESS = 1
#: Bytes of a CUDA IPC handle.
HANDLE_BYTES = 64
#: What is exported is whole pages: a smaller allocation may share its page with another, and would export that too.
_PAGE = 2 << 20
#: srcAccessOrder, two location hints (kind, id each), flags: CUmemcpyAttributes as int32 [6].
_ATTRIBUTES = np.array([_STREAM_ORDER, 0, 0, 0, 0, 0], np.int32)
_FIRST = np.zeros(1, np.uint64)


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise StorageError(f"libcuda.so.1: {error}; the CUDA copier needs the NVIDIA driver") from None


def _check(status: int, what: str) -> None:
    if status:
        raise StorageError(f"{what} failed with CUDA error {status}")


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def current_context() -> int:
    """The CUDA context of this thread; 0 if it has none."""
    context = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(context)), "asking for the CUDA context")
    return context.value or 0


def use(context: int) -> None:
    """Makes a context this thread's: torch does so only with its first call there, and the calls below need one."""
    _check(_library().cuCtxSetCurrent(ctypes.c_void_p(context)), "setting the CUDA context")


def pin(address: int, size: int) -> bool:
    """Pins host memory for every device and maps it. False if somebody else has pinned it. Raises StorageError."""
    status = _library().cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), _PORTABLE_AND_MAPPED)
    if status == _ALREADY_REGISTERED:
        return False
    _check(status, f"pinning {size} bytes of host memory")
    return True


def unpin(address: int) -> None:
    """Undoes `pin`. Raises StorageError."""
    _check(_library().cuMemHostUnregister(ctypes.c_void_p(address)), "unpinning host memory")


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("raw", ctypes.c_byte * HANDLE_BYTES),)


def allocate(size: int) -> int:
    """The address of new device memory, an allocation of its own, so that it can be exported. Raises StorageError."""
    address, pages = ctypes.c_uint64(), -(-size // _PAGE) * _PAGE
    _check(_library().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(pages)), f"taking {size} bytes of VRAM")
    return address.value


def free(address: int) -> None:
    """Gives back what `allocate` gave. Nobody may have it mapped any more. Raises StorageError."""
    _check(_library().cuMemFree_v2(ctypes.c_uint64(address)), "giving VRAM back")


def export(address: int) -> bytes:
    """The handle by which another process of this host maps an allocation. Raises StorageError."""
    handle = _Handle()
    _check(_library().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(address)), "exporting VRAM")
    return bytes(handle)


def map_handle(handle: bytes) -> int:
    """The address of another process's allocation here, whichever device holds it. Raises StorageError."""
    address = ctypes.c_uint64()
    status = _library().cuIpcOpenMemHandle_v2(
        ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(_ENABLE_PEER_ACCESS)
    )
    _check(status, "mapping another process's VRAM")
    return address.value


def unmap(address: int) -> None:
    """Undoes `map_handle`. Raises StorageError."""
    _check(_library().cuIpcCloseMemHandle(ctypes.c_uint64(address)), "unmapping another process's VRAM")


def copy_batch(pieces: Pieces, stream: int, *, into_rows: bool, pinned: bool) -> None:
    """Enqueues all pieces on a stream (never the default one). The addresses must stay valid until they are copied.

    Unpinned rows go one by one: the driver stages them itself and may block the caller. Raises StorageError.
    """
    target, source = (pieces.inside, pieces.outside) if into_rows else (pieces.outside, pieces.inside)
    if not len(target):
        return
    library = _library()
    batch = getattr(library, "cuMemcpyBatchAsync_v2", None) if pinned and len(target) > 1 else None
    if batch is None:
        for to, origin, size in zip(target.tolist(), source.tolist(), pieces.sizes.tolist(), strict=True):
            status = library.cuMemcpyAsync(
                ctypes.c_uint64(to), ctypes.c_uint64(origin), ctypes.c_size_t(size), ctypes.c_void_p(stream)
            )
            _check(status, f"copying {size} bytes")
        return
    lists = [np.ascontiguousarray(array) for array in (target, source, pieces.sizes)]
    status = batch(
        *[_pointer(array) for array in lists],
        ctypes.c_size_t(len(target)),
        _pointer(_ATTRIBUTES),
        _pointer(_FIRST),
        ctypes.c_size_t(1),
        ctypes.c_void_p(stream),
    )
    _check(status, f"a batch of {len(target)} copies")
