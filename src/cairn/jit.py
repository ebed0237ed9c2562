"""The one numba decorator of Cairn: compiled to machine code, free of the GIL, cached on disk."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numba.extending

_PACKAGE = Path(__file__).parent
_STALE_SECONDS = 86_400.0

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles `function` on its first call (nopython, no GIL) and keeps the machine code beside the source, or in
    the user's cache directory if the installation is read-only; if neither can be written, each process compiles anew.

    Kernels raise nothing: they run while other threads hold the GIL, so they report by their return value.
    """
    try:
        with _cache_of_these_sources():
            compiled = numba.njit(function, nogil=True, cache=True, boundscheck=False)
    except RuntimeError:  # numba found no place to keep the machine code
        compiled = numba.njit(function, nogil=True, boundscheck=False)
    return cast(Callable[P, R], compiled)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose body is LLVM IR, callable from kernels only (numba.extending.intrinsic)."""
    return cast(Callable[..., Any], numba.extending.intrinsic(function))


@contextmanager
def _cache_of_these_sources() -> Iterator[None]:
    """Lets numba keep machine code under a name that stands for all of Cairn's sources.

    Numba renews a kernel when its own file changes, but a kernel also holds the code and the constants of the files it
    imports: with those changed, the old machine code would go on working on records of another shape.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or _CACHE
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _cache_directory() -> str:
    """Where machine code of the sources as they are now is kept; empty: numba's own choice. Drops what is a day old."""
    digest = hashlib.blake2s(digest_size=8)
    for path in sorted(_PACKAGE.rglob("*.py")):
        status = path.stat()
        digest.update(f"{path.relative_to(_PACKAGE)} {status.st_size} {status.st_mtime_ns}\n".encode())
    root = _PACKAGE / "__pycache__" / "kernels"
    wanted = root / digest.hexdigest()
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    for other in root.iterdir():
        # Another process may still be at work with what was current today.
        if other != wanted and time.time() - other.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return str(wanted)


_CACHE = _cache_directory()
