"""The disk's directory and the remote store, by trying them; nothing is left behind."""

import mmap
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from cairn.cli.doctor.facts import Disk, Remote
from cairn.config.schema import Config
from cairn.config.schema import Disk as DiskSettings
from cairn.config.schema import Remote as RemoteSettings
from cairn.config.urls import mask_url
from cairn.errors import CairnError
from cairn.tier.arena import PAGE
from cairn.tier.remote import open_store

_IN_MEMORY: Final = ("tmpfs", "ramfs")
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def probe_disk(settings: DiskSettings) -> Disk | None:
    if settings.path is None:
        return None
    place = _existing(settings.path)
    kind, taken = _kind(place), _taken(settings.path)
    system = os.statvfs(place)
    room = system.f_bavail * system.f_frsize + taken if system.f_blocks else 1 << 62  # some (ramfs) tell nothing
    try:
        return Disk(str(settings.path), kind, _takes_direct(place), room, "")
    except OSError as error:
        return Disk(str(settings.path), kind, False, room, error.strerror or str(error))


def probe_remote(config: Config) -> Remote | None:
    remote = config.storage.remote
    if remote.url is None:
        return None
    try:
        parts = urlsplit(remote.url)
    except ValueError:  # which `open_store` says in our words
        return Remote(mask_url(remote.url), _why_unreachable(remote, remote.url), False)
    if parts.scheme == "file":  # not opened, which would make the directory, and sweep it
        place = _existing(Path(unquote(parts.path)))
        fault = "" if os.access(place, os.W_OK | os.X_OK) else "cannot be written to"
        return Remote(mask_url(remote.url), fault, _kind(place) in _IN_MEMORY)
    return Remote(mask_url(remote.url), _why_unreachable(remote, remote.url), parts.hostname in _LOOPBACK)


def _why_unreachable(remote: RemoteSettings, url: str) -> str:
    # Who lends a segment of Mooncake's and leaves takes objects along.
    url = re.sub(r"\bsegment=[^&]*", "", url)
    try:
        store = open_store(url, ttl_s=remote.ttl_s, capacity_bytes=remote.capacity)
        try:
            reason = store.health(deadline=time.monotonic() + remote.timeout_s)
        finally:
            store.close()
    except CairnError as error:
        return str(error)
    return f"does not answer ({reason})" if reason else ""


def _takes_direct(place: Path) -> bool:
    """Whether a page can be written past the page cache. Raises OSError where nothing can be written."""
    descriptor, name = tempfile.mkstemp(prefix="cairn-doctor-", dir=place)
    os.close(descriptor)
    try:
        with mmap.mmap(-1, PAGE) as page:
            descriptor = os.open(name, os.O_RDWR | os.O_DIRECT)
            try:
                return os.pwrite(descriptor, page, 0) == PAGE
            finally:
                os.close(descriptor)
    except OSError:
        return False
    finally:
        Path(name).unlink()


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())


def _taken(path: Path) -> int:
    """Bytes that caches have in the directory, or in a pool's below it."""
    files = (file for name in ("data", "table") for file in (*path.glob(name), *path.glob(f"*/{name}")))
    return sum(file.stat().st_blocks * 512 for file in files)


def _kind(place: Path) -> str:
    """The type of the file system that a directory is on; "" if the kernel does not tell."""
    place, found = place.resolve(), (0, "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, system = line.partition(" - ")
        at = Path(mount.split()[4].encode().decode("unicode_escape"))
        if place.is_relative_to(at) and len(at.parts) >= found[0]:  # the last one covers those before
            found = len(at.parts), system.split()[0]
    return found[1]
