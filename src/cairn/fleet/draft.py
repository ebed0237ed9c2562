"""A file that replaces another in one piece, or not at all."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cairn.errors import LockedError, StorageError


@contextmanager
def draft(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path` (`.new`); when the block ends well it is synced and takes the place of `path`.

    What a killed process left is overwritten. Raises LockedError while another writes it, StorageError if the system
    refuses.
    """
    if not path.name:
        raise StorageError(f"{path}: a directory; name a file that can be written")
    beside = path.with_name(path.name + ".new")
    try:
        file = _locked(beside)
        with file:
            file.truncate(0)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            _sync(path.parent)
    except LockedError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; name a file that can be written") from None


def _locked(beside: Path) -> BinaryIO:
    """The file, ours alone. It may have become the final one between its opening and its locking."""
    while True:
        file = os.fdopen(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=1 << 20)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if beside.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError:
            file.close()
            raise LockedError(f"{beside}: another process writes it; give each a file of its own") from None
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
