"""Looking into a cache directory from outside: read-only, also while its owner is at work."""

import mmap
import os
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from cairn.codec import Raw, Shard
from cairn.codec.frame import Framer
from cairn.errors import StorageError
from cairn.index import LRU, PrefixIndex
from cairn.kv import KVGeometry
from cairn.tier.disk_directory import Superblock, in_use, lock_owner, read_superblock
from cairn.tier.disk_slots import SlotFile
from cairn.tier.disk_table import Recovered, recover

_FILES: Final = ("lock", "superblock", "table", "data")


class NamespaceUse(msgspec.Struct, frozen=True):
    """What one namespace takes: its digest in hex, and its blocks."""

    digest: str
    blocks: int


class FrameCheck(msgspec.Struct, frozen=True):
    """What reading every block showed: sound, damaged (or foreign), and replaced by the owner meanwhile."""

    sound: int
    damaged: int
    changed: int


class Inspection(msgspec.Struct, frozen=True):
    """What a cache directory holds.

    owner: pid, as text, of the process that has it open; None if none has. slot_bytes: of which block_bytes are
    payload. disk_bytes: what all files take. blocks: those that the next owner would find. damaged_records: neither
    sound nor empty. unreachable_records: sound, but a block before them is missing or another slot holds the same
    block. frames: None unless the blocks were read.
    """

    path: str
    owner: str | None
    geometry: KVGeometry
    shard: Shard
    slots: int
    slot_bytes: int
    block_bytes: int
    disk_bytes: int
    blocks: int
    namespaces: list[NamespaceUse]
    damaged_records: int
    unreachable_records: int
    frames: FrameCheck | None


class _Held(NamedTuple):
    """A table and which of its records lead to a block, as indexes into it."""

    found: Recovered
    reachable: "np.ndarray[tuple[int], np.dtype[np.intp]]"


def inspect_directory(path: str | Path, verify: bool = False) -> Inspection:
    """Reads a cache directory's superblock and table, and every block too if `verify`. Changes nothing.

    While a process owns the directory the answer is about a moving target. Raises StorageError if the directory cannot
    be read or is none of Cairn's.
    """
    path = Path(path)
    try:
        superblock = read_superblock(path)
        if superblock is None:
            raise StorageError(f"{path}: not a cache directory (no superblock); give one that Cairn has made")
        owner = lock_owner(path) if in_use(path) else None
        held = _read_table(path, superblock)
        frames = _check_frames(path, superblock, held) if verify else None
        disk_bytes = sum((path / name).stat().st_blocks * 512 for name in _FILES if (path / name).exists())
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; give a cache directory that can be read") from None
    digests, counts = np.unique(held.found.namespaces[held.reachable], axis=0, return_counts=True)
    return Inspection(
        path=str(path),
        owner=owner,
        geometry=superblock.geometry,
        shard=superblock.shard,
        slots=superblock.slots,
        slot_bytes=superblock.slot_bytes,
        block_bytes=superblock.geometry.block_bytes,
        disk_bytes=disk_bytes,
        blocks=len(held.reachable),
        namespaces=[NamespaceUse(d.tobytes().hex(), int(n)) for d, n in zip(digests, counts, strict=True)],
        damaged_records=held.found.damaged,
        unreachable_records=len(held.found.slots) - len(held.reachable),
        frames=frames,
    )


def _read_table(path: Path, superblock: Superblock) -> _Held:
    fd = os.open(path / "table", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = recover(fd, superblock.slots)
    finally:
        os.close(fd)
    index = PrefixIndex(superblock.slots, LRU)
    kept = index.restore(found.keys, found.parents, found.roots, found.slots)
    return _Held(found, np.flatnonzero(np.isin(found.slots, kept)))


def _check_frames(path: Path, superblock: Superblock, held: _Held) -> FrameCheck:
    file = SlotFile(
        path / "data", Framer(Raw(superblock.geometry, superblock.layout), superblock.shard), writable=False
    )
    row = np.frombuffer(mmap.mmap(-1, file.slot_bytes), np.uint8)
    wrong: dict[int, bytes] = {}
    try:
        for at in held.reachable.tolist():
            slot, key = int(held.found.slots[at]), held.found.keys[at].tobytes()
            if file.read(slot, [key], [row]) != [None]:
                wrong[slot] = key
    finally:
        file.close()
    # What the owner has replaced since the table was read is not damaged.
    now = _read_table(path, superblock).found if wrong else held.found
    present = {int(slot): key.tobytes() for slot, key in zip(now.slots, now.keys, strict=True)}
    damaged = sum(present.get(slot) == key for slot, key in wrong.items())
    return FrameCheck(sound=len(held.reachable) - len(wrong), damaged=damaged, changed=len(wrong) - damaged)
