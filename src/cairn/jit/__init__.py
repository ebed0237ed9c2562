"""The one numba decorator of Cairn: compiled to machine code, free of the GIL, cached on disk."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

from cairn.jit.cache import KernelCache
from cairn.jit.intrinsics import (
    advise,
    call_c,
    clock_gettime,
    close_file,
    fence,
    intrinsic,
    load_acquire,
    load_big,
    load_byte,
    load_word,
    map_file,
    open_file,
    pread,
    preadv2,
    prefetch,
    prefetch_far,
    statx,
    store_half,
    store_release,
    store_word,
    trailing_zeros,
    unlike_digits,
    unmap,
)

__all__ = [
    "advise",
    "call_c",
    "clock_gettime",
    "close_file",
    "compiled",
    "fence",
    "intrinsic",
    "kernel",
    "load_acquire",
    "load_big",
    "load_byte",
    "load_word",
    "map_file",
    "open_file",
    "pread",
    "preadv2",
    "prefetch",
    "prefetch_far",
    "statx",
    "store_half",
    "store_release",
    "store_word",
    "trailing_zeros",
    "unlike_digits",
    "unmap",
]

P = ParamSpec("P")
R = TypeVar("R")

_kernels: list[Any] = []


def compiled() -> dict[str, int]:
    """How often each kernel was compiled, or taken from the disk, in this process: once for each kind of arguments."""
    return {f"{one.py_func.__module__}.{one.py_func.__name__}": len(one.signatures) for one in _kernels}


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles `function` on its first call (nopython, no GIL) and keeps the machine code beside the source, or in
    the user's cache directory if the installation is read-only; if neither can be written, each process compiles anew.

    Of several processes that need it at once, one compiles, and the others wait for it.
    Kernels raise nothing: they run while other threads hold the GIL, so they report by their return value.
    """
    made = numba.njit(function, nogil=True, boundscheck=False)
    kept = KernelCache.of(function)
    if kept is not None:
        made._cache, made.compile = kept, kept.around(made.compile)
    _kernels.append(made)
    return cast(Callable[P, R], made)
