"""The one numba decorator of Cairn: compiled to machine code, free of the GIL, cached on disk."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numba.extending

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles `function` on its first call (nopython, no GIL) and keeps the machine code beside the source, or in
    the user's cache directory if the installation is read-only; if neither can be written, each process compiles anew.

    Kernels raise nothing: they run while other threads hold the GIL, so they report by their return value.
    """
    try:
        compiled = numba.njit(function, nogil=True, cache=True, boundscheck=False)
    except RuntimeError:  # numba found no place to keep the machine code
        compiled = numba.njit(function, nogil=True, boundscheck=False)
    return cast(Callable[P, R], compiled)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose body is LLVM IR, callable from kernels only (numba.extending.intrinsic)."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))
