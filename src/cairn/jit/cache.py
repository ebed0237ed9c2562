"""Where machine code is kept, for all processes on the machine: what one of them compiled, the others load."""

import fcntl
import glob
import hashlib
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numba
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_STALE_SECONDS: Final = 86_400.0
#: Who compiles longer than this is not waited for, nor is anybody from then on: it may have been stopped, and may have
#: the locks of all the kernels that call the one it was at.
_PATIENCE_S: Final = 60.0
_POLL_S: Final = 0.01


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function. Of the processes that find no machine code in it one compiles, the others wait.

    It spares the time, and numba's own cache is not made for two that save at once: one's entry may get lost, or get
    the other's machine code, which takes other arguments. So nobody saves without the lock, which a process that dies
    lets go of. Numba calls it in one thread at a time, and kernels call each other in no circle, so nobody waits for
    whom he keeps waiting. A file that cannot be read or written is as if it were not there.
    """

    #: Whether this process has waited in vain.
    _impatient: ClassVar[bool] = False

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Self | None:
        """None if there is no place to keep machine code."""
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = before or _DIRECTORY
        try:
            return cls(function)
        except RuntimeError:  # so numba says it
            return None
        finally:
            numba.config.CACHE_DIR = before

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._place = Path(self.cache_path)
        self._stem = self._impl.filename_base
        self._lock: int | None = None

    def around(self, compile_: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The dispatcher's `compile`, behind which nobody is kept waiting any more, also if it fails."""

        def compiling(sig: Any) -> Any:
            with global_compiler_lock:  # which `compile_` takes itself: nobody else's lock is let go of
                try:
                    return compile_(sig)
                finally:
                    self._release()

        return compiling

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None: the caller is to compile, and to save then."""
        kept = self._load(sig, target_context)
        if kept is None and self._take():
            kept = self._load(sig, target_context)
        return kept

    def save_overload(self, sig: Any, data: Any) -> None:
        if self._lock is not None:
            with suppress(OSError):  # a full disk: the next process compiles anew
                super().save_overload(sig, data)

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (OSError, EOFError, pickle.UnpicklingError):  # a file that a crash of the machine cut off
            if self._lock is not None:
                self._drop()
            return None

    def _drop(self) -> None:
        """Removes all that is kept, as numba would not: its index first, so that nobody takes a file for another's."""
        with suppress(OSError):
            for path in (self._place / f"{self._stem}.nbi", *self._place.glob(f"{glob.escape(self._stem)}.*.nbc")):
                path.unlink(missing_ok=True)

    def _take(self) -> bool:
        """Takes the lock as soon as it is free. False if it is not in time, or cannot be had here."""
        if self._lock is not None:  # the kernel calls itself, with other arguments
            return True
        until = time.monotonic() + (0.0 if KernelCache._impatient else _PATIENCE_S)
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._place / f"{self._stem}.lock", os.O_RDONLY | os.O_CREAT, 0o644)
        except OSError:
            return False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(_POLL_S)  # the system's wait has no deadline
                    continue
                KernelCache._impatient = True
                os.close(lock)
                return False
            except OSError as error:
                os.close(lock)
                _warn(str(error))
                return False
            self._lock = lock
            return True

    def _release(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing alone would not do if a child of this process has it, too
            os.close(self._lock)
            self._lock = None


@cache
def _warn(error: str) -> None:
    """Tells once."""
    logger.warning(
        "kernels are compiled by every process anew, as their directory has no locks (%s): "
        "set NUMBA_CACHE_DIR to one on a local disk",
        error,
    )


def _sources(directory: str) -> Iterator[os.DirEntry[str]]:
    """Every Python file below it, in an order of names. (`Path.rglob` would look at all machine code, too: 50 ms.)"""
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.endswith(".py"):
            yield entry
        elif entry.name != "__pycache__" and entry.is_dir():
            yield from _sources(entry.path)


def _sources_directory() -> str:
    """Where machine code of the sources as they are now is kept; empty: numba's own choice. Drops what is a day old.

    Numba renews a kernel when its own file changes, but a kernel also holds the code and the constants of the files it
    imports: with those changed, the old machine code would go on working on records of another shape. Nor may two
    versions of numba share it: one takes the other's files for missing, and writes its own in their place.
    """
    digest = hashlib.blake2s(numba.__version__.encode(), digest_size=8)
    for source in _sources(str(_PACKAGE)):
        status = source.stat()
        digest.update(f"{source.path} {status.st_size} {status.st_mtime_ns}\n".encode())
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


_DIRECTORY = _sources_directory()
